"""`dualtrace mask`: what a mask allows, whether it is well formed, and its digest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.exits import FAILED, USAGE, tell_problem
from dualtrace.cli.explaining import Detail, Place, explain_all, place_options, require_place
from dualtrace.cli.inputs import STDIN_OR_FILE, Ask, ask_options, command_options, parse_id_list
from dualtrace.cli.visible import show_line
from dualtrace.problems import InvalidArgument, Problem, Reason

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dualtrace.cli.mask_files import MaskFile
    from dualtrace.questions.answers import MaskExplanation
    from dualtrace.questions.asked import MaskWhy

MASK = click.option("--mask", "mask_file", required=True, type=STDIN_OR_FILE, metavar="FILE.json",
                    help="The mask, as docs/masks.md says.")  # fmt: skip
SHOWN_ROWS = 12


@click.group()
def mask() -> None:
    """Look at masks: draw one, ask why, check it, take its digest."""


@mask.command()
@ask_options(target_required=False)
@MASK
@place_options
@click.option("--layer", type=int, help="Only this layer, with --head; default: what any layer and head may see.")
@click.option("--head", type=int, help="Only this query head, with --layer.")
@click.option(
    "--why",
    "whys",
    multiple=True,
    metavar="Q,K[,LAYER,HEAD]",
    help="Which rule decides whether row Q may see key K; rows count a prefix token. Repeat it.",
)
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Also write a picture.")
@click.option("--npy", type=click.Path(dir_okay=False, path_type=Path), help="Also write the booleans, [row, key].")
@click.option("--allow-large", is_flag=True, help="Draw and write also beyond 256 tokens.")
def explain(
    ask: Ask, mask_file: str, place: Place, layer: int | None, head: int | None, whys: tuple[str, ...],
    png: Path | None, npy: Path | None, allow_large: bool,
) -> None:  # fmt: skip
    """Draw what a mask allows on a sequence, and say why; no model is run."""
    from dualtrace.cli.mask_files import read_mask
    from dualtrace.cli.output import output_console, show, write_json
    from dualtrace.questions.asked import MaskForm

    require_place(ask, place)
    read = read_mask(mask_file)
    why = tuple(_parse_why(text, layer, head) for text in whys)
    forms = (MaskForm.NPY, MaskForm.PNG) if png is not None else (MaskForm.NPY,)
    detail = Detail(layer, head, why, forms, allow_large)
    found = _explain(ask, place, read, detail, must_draw=png is not None or npy is not None)
    for file, content in ((png, found.png), (npy, found.npy)):
        if file is not None and content is not None:
            file.write_bytes(content)
            click.echo(f"wrote {file}", err=True)
    explained = Explained(read, found, place, detail)
    if ask.as_json:
        write_json({"kind": "dualtrace.mask", "target": ask.target or None, **explained.to_json()})
    else:
        show(explained.render(output_console().width))


def _explain(ask: Ask, place: Place, read: MaskFile, detail: Detail, *, must_draw: bool) -> MaskExplanation:
    """With the cells where they may be drawn; a sequence that is too long for that is still explained."""
    (found,) = explain_all(ask, place, [(read, detail)])
    too_large = isinstance(found, Problem) and found.detail.field in {"allow_large", "forms"}
    if too_large and not must_draw:
        (found,) = explain_all(ask, place, [(read, replace(detail, forms=()))])
    if isinstance(found, Exception):
        raise found
    return found


def _parse_why(text: str, layer: int | None, head: int | None) -> MaskWhy:
    from dualtrace.questions.asked import MaskWhy

    numbers = parse_id_list(text, "--why")
    if len(numbers) == 2:
        numbers = (*numbers, layer or 0, head or 0)
    if len(numbers) != 4:
        message = f"{text!r:.40} is not a question; write ROW,KEY or ROW,KEY,LAYER,HEAD"
        raise InvalidArgument(Reason.MALFORMED, message, field="--why")
    query, key, layer, head = numbers
    return MaskWhy(layer, head, query, key)


@dataclass(frozen=True, eq=False)
class Explained:
    """A mask and what was found out about it, to be shown or written."""

    mask: MaskFile
    found: MaskExplanation
    place: Place
    detail: Detail

    def _seen(self) -> Any:
        """[T,T] bool, or None where it was not drawn."""
        from dualtrace.masks.arrays import read_npy

        return None if self.found.npy is None else read_npy(self.found.npy).content.values

    def render(self, width: int) -> Iterator[RenderableType]:
        from rich.text import Text

        from dualtrace.cli.mask_picture import columns_needed, draw
        from dualtrace.cli.tables import pairs_table

        detail, seen, tokens = self.detail, self._seen(), self.found.tokens
        where = "every layer and head together"
        if detail.layer is not None:
            where = f"layer {detail.layer}, head {detail.head}"
        facts = [*_facts(self.mask, self.found), ("shown", where)]
        yield pairs_table([(name, Text(show_line(value, 400))) for name, value in facts])
        yield Text("")
        if seen is None:
            yield Text(f"{len(tokens)} tokens are not drawn unasked; say --allow-large, and --png for a file", "yellow")
        elif columns_needed(seen.shape[0]) > width and not detail.allow_large:
            needed = columns_needed(seen.shape[0])
            message = f"not drawn: it needs {needed} columns and there are {width}; use --png FILE, or --allow-large"
            yield Text(message, "yellow")
        else:
            pieces = None if self.place.made_up or not tokens.pieces else tokens.pieces
            yield from draw(seen, pieces, seen.shape[0] - len(tokens), width, allow_large=True)
        yield from self._answers()

    def _answers(self) -> Iterator[RenderableType]:
        from rich.text import Text

        for asked, answer in zip(self.detail.why, self.found.answers, strict=True):
            may = "may see" if answer.may_see else "may not see"
            at = f"at layer {asked.layer} head {asked.head}"
            yield Text(f"\nrow {asked.query} {may} key {asked.key} {at}: {show_line(answer.rule, 400)}")

    def to_json(self) -> dict[str, Any]:
        from dualtrace.masks.json_form import to_json as mask_to_json
        from dualtrace.records import parse_json, to_json

        found = self.found
        return {
            "file": self.mask.path,
            "mask": parse_json(mask_to_json(self.mask.usual()), "the mask"),
            "layer": self.detail.layer,
            "head": self.detail.head,
            **_checked(self.mask, found),
            "tokens": None if self.place.made_up else to_json(found.tokens),
            "rows": _runs(self._seen()),
            "answers": [
                {**to_json(asked), **to_json(answer)}
                for asked, answer in zip(self.detail.why, found.answers, strict=True)
            ],
        }


def _runs(seen: Any) -> list[list[list[int]]] | None:
    """Per row the runs [start, end) of keys that it may see."""
    if seen is None:
        return None
    import numpy as np

    padded = np.pad(seen.astype(np.int8), ((0, 0), (1, 1)))
    steps = np.diff(padded, axis=1)
    return [
        [[start, end] for start, end in zip(np.flatnonzero(row == 1).tolist(), np.flatnonzero(row == -1).tolist(),
                                            strict=True)]
        for row in steps
    ]  # fmt: skip


def _facts(mask: MaskFile, found: MaskExplanation) -> list[tuple[str, str]]:
    from dualtrace.cli.variant_tables import ranges

    meta, leaks = found.metadata, found.leaking_rows
    told = ranges(leaks[:SHOWN_ROWS]) + (" ..." if len(leaks) > SHOWN_ROWS else "")
    empty_row = mask.spec.empty_row.value
    refused = "; empty_row is ERROR, so a forward refuses the mask" if empty_row == "ERROR" else ""
    empty = f"{found.empty_rows} (layer, head, row), under empty_row {empty_row}{refused}"
    return [
        ("mask", f"{meta.name}, needs {meta.shape}"),
        ("digest", meta.digest),
        ("tokens", str(len(found.tokens))),
        ("sparsity", f"{meta.sparsity:.4f} of all entries may not be seen"),
        ("leaks", f"{len(leaks)} rows see the token they predict: {told}" if leaks else "none"),
        ("empty rows", empty if found.empty_rows else "none"),
        *(("note", note) for note in [*meta.notes, *_zeroed(mask)]),
    ]


def _zeroed(mask: MaskFile) -> Iterator[str]:
    if any(edge.mode.value == "POST_SOFTMAX_ZERO" for edge in mask.spec.edges):
        yield "weights set to zero after the softmax are drawn as not seen, and orange in a PNG"


@mask.command()
@ask_options(target_required=False)
@click.option(
    "--mask",
    "mask_files",
    multiple=True,
    required=True,
    type=STDIN_OR_FILE,
    metavar="FILE.json",
    help="The mask; repeat it for several.",
)
@place_options
def check(ask: Ask, mask_files: tuple[str, ...], place: Place) -> None:  # fmt: skip
    """Say whether masks are well formed; with a sequence and TARGET or --shape, also whether they can be used there.

    Ends with 2 when one is malformed or does not fit, else with 1 when one leaks or has rows that may see nothing
    under empty_row ERROR.
    """
    from dualtrace.cli.output import show, write_json

    on_sequence = bool(ask.target) or place.shape is not None or place.given is not None
    results = [Checked(path, *_try_read(path)) for path in mask_files]
    if on_sequence:
        results = _check_there(ask, place, results)
    for result in results:
        if result.problem is not None:
            click.echo(f"{show_line(result.path, 200)}: {tell_problem(result.problem)}", err=True)
    if ask.as_json:
        write_json({"kind": "dualtrace.mask_check", "masks": [result.to_json() for result in results]})
    else:
        show(part for result in results if result.problem is None for part in result.render())
    code = max(result.code for result in results)
    if code:
        click.get_current_context().exit(code)


def _try_read(path: str) -> tuple[MaskFile | None, Problem | None]:
    from dualtrace.cli.mask_files import read_mask

    try:
        return read_mask(path), None
    except Problem as problem:
        return None, problem


def _check_there(ask: Ask, place: Place, results: Sequence[Checked]) -> list[Checked]:
    """The well-formed ones again, on the sequence."""
    good = [result for result in results if result.mask is not None]
    found = explain_all(ask, place, [(result.mask, Detail()) for result in good if result.mask is not None])
    explained = dict(zip((id(result) for result in good), found, strict=True))
    checked = []
    for result in results:
        answer = explained.get(id(result))
        if isinstance(answer, Problem):
            checked.append(replace(result, problem=answer))
        else:
            checked.append(replace(result, found=answer))  # type: ignore[arg-type]  # only Problems are kept
    return checked


@dataclass(frozen=True, eq=False)
class Checked:
    """What was found out about one mask file."""

    path: str
    mask: MaskFile | None
    problem: Problem | None
    found: MaskExplanation | None = None  # None: only its syntax was checked

    @property
    def code(self) -> int:
        if self.problem is not None:
            return USAGE
        if self.found is None or self.mask is None:
            return 0
        empty = self.found.empty_rows > 0 and self.mask.spec.empty_row.value == "ERROR"
        return FAILED if self.found.leaking_rows or empty else 0

    def render(self) -> Iterator[RenderableType]:
        from rich.text import Text

        from dualtrace.cli.tables import pairs_table
        from dualtrace.masks.json_form import digest

        assert self.mask is not None
        facts = [("digest", digest(self.mask.usual())), ("syntax", "well formed")]
        if self.found is not None:
            facts = _facts(self.mask, self.found)
        verdict = "cannot be used as it is" if self.code else "good"
        yield Text(f"{show_line(self.path, 200)}: {verdict}", "bold")
        yield pairs_table([(name, Text(show_line(value, 400))) for name, value in facts])
        yield Text("")

    def to_json(self) -> dict[str, Any]:
        from dualtrace.masks.json_form import digest
        from dualtrace.records import to_json
        from dualtrace.runs.run import store_problem

        document: dict[str, Any] = {"file": self.path, "good": self.code == 0, "problem": None}
        if self.problem is not None:
            return {**document, "problem": to_json(store_problem(self.problem))}
        assert self.mask is not None
        if self.found is None:
            return {**document, "digest": digest(self.mask.usual())}
        return {**document, **_checked(self.mask, self.found)}


def _checked(mask: MaskFile, found: MaskExplanation) -> dict[str, Any]:
    from dualtrace.records import to_json

    return {
        "digest": found.metadata.digest,
        "metadata": to_json(found.metadata),
        "leaking_rows": list(found.leaking_rows),
        "empty_rows": found.empty_rows,
        "empty_row": mask.spec.empty_row.value,
    }


@mask.command()
@click.argument("file", type=STDIN_OR_FILE)
@command_options
def digest(file: str, as_json: bool) -> None:
    """Print the digest of the mask in FILE: that of the parsed mask, so spacing and left-out defaults do not count."""
    from dualtrace.cli.mask_files import read_mask
    from dualtrace.cli.output import write_json
    from dualtrace.masks import json_form

    found = json_form.digest(read_mask(file).usual())
    write_json({"kind": "dualtrace.mask_digest", "file": file, "digest": found}) if as_json else click.echo(found)
