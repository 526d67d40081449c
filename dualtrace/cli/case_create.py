"""`dualtrace case create`: cases out of files, or one out of the options that `dualtrace compare` has.

It maps options onto a case. It must not know how a case is run.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.case_library import SET, check_side, read_filled, tell_kept
from dualtrace.cli.compare import judging_options, sections_of_comparison
from dualtrace.cli.compare_question import QuestionAsked, question_options
from dualtrace.cli.coordinator_link import Link, link_options, with_coordinator
from dualtrace.cli.help_sections import SectionedCommand
from dualtrace.cli.inputs import STDIN_OR_FILE
from dualtrace.problems import InvalidArgument, Reason

if TYPE_CHECKING:
    from dualtrace.cli.comparing import Wanted
    from dualtrace.coordinator_client import CoordinatorClient
    from dualtrace.library import Case, SideSpec
    from dualtrace.masks.spec import MaskSpec
    from dualtrace.questions.asked import ForwardQuestion

Function = Callable[..., Any]


@dataclass(frozen=True)
class SightsAsked:
    """View and mask of each side, as written; one without a side is for both."""

    mask: str | None = None
    left_mask: str | None = None
    right_mask: str | None = None
    view: str | None = None
    left_view: str | None = None
    right_view: str | None = None
    allow_leak: bool = False

    def sides(self, left: str, right: str, *, others_from_stdin: int) -> tuple[SideSpec, SideSpec]:
        """`others_from_stdin`: of the question's files, how many are standard input."""
        from dualtrace.cli.mask_files import read_mask

        paths = {self.left_mask or self.mask, self.right_mask or self.mask} - {None}
        if others_from_stdin + ("-" in paths) > 1:
            message = "two files are '-', and there is one standard input; give a file for one of them"
            raise InvalidArgument(Reason.CONFLICT, message, field="--mask")
        masks = {path: read_mask(path).inline() for path in paths if path is not None}
        return self._side("left", left, masks), self._side("right", right, masks)

    def _side(self, name: str, target: str, masks: Mapping[str, MaskSpec]) -> SideSpec:
        from dualtrace.library import SideSpec
        from dualtrace.questions.asked import Variant
        from dualtrace.view_form import parse_view
        from dualtrace.views import BASE

        mask = getattr(self, f"{name}_mask") or self.mask
        spec = masks[mask] if mask else None
        view = getattr(self, f"{name}_view") or self.view
        return SideSpec(target, Variant(parse_view(view) if view else BASE, spec, self.allow_leak and bool(mask)))


def sights_options(function: Function) -> Function:
    """--mask, --view, of both sides or one; the function gets one `sights`."""

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        names = SightsAsked.__dataclass_fields__
        return function(sights=SightsAsked(**{name: given.pop(name) for name in names}), **given)

    wrapped: Function = click.option("--allow-leak", is_flag=True, help="Read rows that see the token they predict.")(
        command
    )
    for whose, prefix in (("the right side's", "right-"), ("the left side's", "left-"), ("both sides'", "")):
        wrapped = click.option(f"--{prefix}view", metavar="VIEW", help=f"View, {whose}.")(wrapped)
        wrapped = click.option(f"--{prefix}mask", type=STDIN_OR_FILE, metavar="FILE.json", help=f"Mask, {whose}.")(
            wrapped
        )
    return wrapped


class NewCase(SectionedCommand):
    def sections(self) -> Sequence[tuple[str, Collection[str]]]:
        links = {*Link.__dataclass_fields__} - {"timeout_seconds"}
        return (
            ("The case", ("tags", "description", "file", "force", "values")),
            *(
                (title, [name for name in names if name not in links])
                for title, names in sections_of_comparison()
                if "reached" not in title
            ),
            ("The coordinator", Link.__dataclass_fields__),
        )


@click.command("create", cls=NewCase, epilog="""\b
Examples:
  dualtrace case create cases/
  dualtrace case create capitals backend:torch backend:jax --text 'Paris is in France.' --tag smoke
  dualtrace case create capitals 'torch:${MODEL}' 'jax:${MODEL}' --text 'Paris.' --file cases/capitals.yaml
""")  # fmt: skip
@click.argument("words", nargs=-1, required=True, metavar="FILES... | NAME LEFT [RIGHT]")
@click.option("--tag", "tags", multiple=True, help="Of a new case; repeat it for several.")
@click.option("--description", default="", help="Of a new case, for people.")
@click.option(
    "--file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.yaml",
    help="Write the new case there rather than keep it in the coordinator.",
)
@click.option("--force", is_flag=True, help="Replace the --file that is there.")
@sights_options
@question_options
@judging_options(results=False)
@SET
@link_options()
def create_command(
    link: Link, asked: QuestionAsked, words: tuple[str, ...], values: tuple[str, ...], as_json: bool, **given: Any
) -> None:  # fmt: skip
    """Keep cases in the coordinator; a name that is taken is refused.

    From FILES or folders, or one case NAME of LEFT and RIGHT out of the question's options, as for `dualtrace compare`;
    with --file that one is written down instead, and its sides may be any targets. Without RIGHT both sides are LEFT.
    """
    if asked.is_empty:
        _refuse_options_of_new(asked, given)
        paths = [_existing(word) for word in words]
        cases = read_filled(paths, values)

        async def work(client: CoordinatorClient) -> list[Case]:
            return [await client.create_case(case) for case in cases]

        tell_kept("created", with_coordinator(link, work), as_json)
        return
    if values:
        message = "--set fills in cases that are read from files; write the new case's sides out"
        raise InvalidArgument(Reason.CONFLICT, message, field="--set")
    _create_new(link, asked, words, as_json, **given)


def _refuse_options_of_new(asked: QuestionAsked, given: dict[str, Any]) -> None:
    from dualtrace.compare.gates import DEFAULT_GATES

    wanted: Wanted = given["wanted"]
    judged = wanted.tolerance is not None or wanted.policy != DEFAULT_GATES
    named = any(given[name] for name in ("file", "tags", "description", "force"))
    if named or judged or asked != QuestionAsked() or given["sights"] != SightsAsked():
        message = (
            "without a question the cases are read from files, as they stand there; leave the options of a new case "
            "out (--file, --tag, --mask, --tolerance and their like)"
        )
        raise InvalidArgument(Reason.CONFLICT, message, field="--text")


def _existing(word: str) -> Path:
    path = Path(word)
    if not path.exists():
        message = f"there is no file or folder {word!r:.120}; to make a new case give a question (--text, --next, ...)"
        raise InvalidArgument(Reason.NOT_FOUND, message, field="paths")
    return path


def _create_new(
    link: Link, asked: QuestionAsked, words: Sequence[str], as_json: bool, *, tags: tuple[str, ...], description: str,
    file: Path | None, force: bool, sights: SightsAsked, wanted: Wanted,
) -> None:  # fmt: skip
    name, left, right = _split(words)
    sides = sights.sides(left, right, others_from_stdin=asked.files_from_stdin)

    def make(question: ForwardQuestion) -> Case:
        from dualtrace.library import Case

        return Case(name, question, sides[0], sides[1], wanted.tolerance, wanted.policy, tags, description)

    if file is None:
        for which, side in zip(("left", "right"), sides, strict=True):
            check_side(name, which, side, "target", instead="or give --file FILE.yaml to write the case down")

        async def work(client: CoordinatorClient) -> Case:
            return await client.create_case(make(await _read_there(asked, client, sides, link)))

        tell_kept("created", [with_coordinator(link, work)], as_json)
        return
    _write(file, make(_read_question(asked, sides, link)), force, as_json)


def _split(words: Sequence[str]) -> tuple[str, str, str]:
    if not 2 <= len(words) <= 3:
        message = f"{len(words)} words given; a new case needs its NAME, LEFT and, where it differs, RIGHT"
        raise InvalidArgument(Reason.MISSING, message, field="words")
    return words[0], words[1], words[-1]


async def _read_there(
    asked: QuestionAsked, client: CoordinatorClient, sides: Sequence[SideSpec], link: Link
) -> ForwardQuestion:
    from dualtrace.cli.coordinator_texts import write_out

    question = await write_out(asked, client, [side.target for side in sides], link.deadline)
    assert question is not None, "checked"
    return question


def _read_question(asked: QuestionAsked, sides: Sequence[SideSpec], link: Link) -> ForwardQuestion:
    """A file holds ids where a tokenizer is needed: a backend's may be asked, others are not opened for it."""
    if not asked.needs_tokenizer:
        return asked.read_whole()
    if not any(side.target.startswith("backend:") for side in sides):
        message = (
            f"{asked.needs_tokenizer} needs a tokenizer, and no side is a backend, whose own would be asked; give ids: "
            "`dualtrace tokenize TARGET --text TEXT` shows them"
        )
        raise InvalidArgument(Reason.CONFLICT, message, field=asked.needs_tokenizer)
    return with_coordinator(link, lambda client: _read_there(asked, client, sides, link))


def _write(file: Path, case: Case, force: bool, as_json: bool) -> None:
    from dualtrace.cases.files import write_case
    from dualtrace.cli.output import put, write_json

    if file.exists() and not force:
        message = f"{file} is there; give --force to replace it"
        raise InvalidArgument(Reason.ALREADY_EXISTS, message, field="--force")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(write_case(_placed(case, file)), encoding="utf-8")
    if as_json:
        write_json({"kind": "dualtrace.cases", "files": [os.fspath(file)]})
    else:
        put(f"{file}\n")


def _placed(case: Case, file: Path) -> Case:
    """Folders and files as they are meant from where the case stands."""
    from dataclasses import replace

    from dualtrace.targets import FILE, parse_target

    def place(side: SideSpec) -> SideSpec:
        if "$" in side.target:  # filled in when the file is read
            return side
        target = parse_target(side.target)
        path = Path(target.rest)
        if path.is_absolute() or not ((target.is_engine and path.is_dir()) or target.kind == FILE):
            return side
        rest = os.path.relpath(path, file.parent)
        return replace(side, target=rest if target.kind == FILE else f"{target.kind}:{rest}")

    return replace(case, left=place(case.left), right=place(case.right))
