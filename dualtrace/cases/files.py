"""Cases as files that live in a repository: YAML or JSON, one case or many in a file, their canonical form.

    name: france
    tags: [smoke]
    left: torch:${MODEL}
    right: {target: "jax:${MODEL}", view: "finetuned:poet"}
    question: {rolling: {inputs: ["The capital of France is Paris."]}}

Reading what was written gives the same case. What is wrong is refused with file and line. It knows the form and the
folders that files lie in. It must not know who runs a case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dualtrace.cases.documents import Marked, name_kind, read_documents
from dualtrace.cases.questions import read_question, write_question
from dualtrace.cases.values import (
    FLAG,
    NUMBER,
    TEXT,
    WHOLE,
    Part,
    build,
    list_of,
    object_of,
    read_list,
    read_object,
    read_text,
)
from dualtrace.compare.gates import GatePolicy
from dualtrace.compare.tolerance import PROFILES, Tolerance
from dualtrace.library import Case, SideSpec
from dualtrace.masks import json_form
from dualtrace.masks.limits import VERSION
from dualtrace.masks.spec import MaskSpec
from dualtrace.problems import InvalidArgument, NotFound, Reason
from dualtrace.questions.asked import Variant
from dualtrace.view_form import parse_view, write_view
from dualtrace.views import BASE, View

SUFFIXES = (".yaml", ".yml", ".json")
MAX_FILE_BYTES = 64 << 20
MAX_WIDTH = 1_000_000_000  # a text is never folded: one line of it is one line of the file
BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*(?::[A-Za-z0-9_./-]+|:\$\{[A-Z0-9_]+\})?")
OTHER_BREAKS = re.compile("[\r\x85\u2028\u2029]")  # a block would give them back as plain newlines
WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}  # for other readers' sake too
GIVEN = ("request", "given by the caller")  # name and source of numbers that no profile has


@dataclass(frozen=True)
class FiledCase:
    """A case and where it was written."""

    case: Case
    file: Path
    line: int


def read_cases(path: Path) -> tuple[Case, ...]:
    """The cases of a file, or of all case files in a folder and below it."""
    return tuple(filed.case for filed in find_cases([path]))


def find_cases(paths: Sequence[Path]) -> tuple[FiledCase, ...]:
    """The cases of files and folders, in order; a name that stands twice anywhere is refused."""
    found: dict[str, FiledCase] = {}
    for file in _list_files(paths):
        for filed in read_case_file(file):
            first = found.get(filed.case.name)
            if first is not None:
                message = f"case {filed.case.name} stands in {first.file}:{first.line} already; give each its own name"
                raise InvalidArgument(Reason.DUPLICATE, message, field=f"{filed.file}:{filed.line}")
            found[filed.case.name] = filed
    return tuple(found.values())


def _list_files(paths: Sequence[Path]) -> Iterator[Path]:
    seen: set[Path] = set()
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not files:
                message = f"{path} holds no case file; they end in {', '.join(SUFFIXES)}"
                raise NotFound(Reason.NOT_FOUND, message, field=str(path))
        else:
            files = [path]
        for file in files:
            if file.resolve() not in seen:  # a folder and a file in it may both be named
                seen.add(file.resolve())
                yield file


def read_case_file(file: Path) -> tuple[FiledCase, ...]:
    return tuple(FiledCase(case, file, line) for case, line in read_case_text(_read_text(file), str(file)))


def read_case_text(text: str, file: str) -> tuple[tuple[Case, int], ...]:
    """The cases of a text and their lines. `file` is its name in messages; one that ends in .json holds JSON."""
    documents = read_documents(text, file, is_json=file.endswith(".json"))
    found = []
    for document in documents:
        if isinstance(document.value, dict) and "cases" in document.value:
            read_object(document, "the file", ("cases",))
            nodes = read_list(document.value["cases"], "cases")
        else:
            nodes = [document]
        found += [(_read_case(node), node.line) for node in nodes]
    if not found:
        raise InvalidArgument(Reason.EMPTY, f"{file} holds no case", field=file)
    return tuple(found)


def _read_text(file: Path) -> str:
    if file.suffix not in SUFFIXES:
        message = f"{file} is no case file; they end in {', '.join(SUFFIXES)}"
        raise InvalidArgument(Reason.MALFORMED, message, field=str(file), allowed=", ".join(SUFFIXES))
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise NotFound(Reason.NOT_FOUND, f"cannot read {file}: {error.strerror or error}", field=str(file)) from None
    if len(content) > MAX_FILE_BYTES:
        message = f"{file} holds more than {MAX_FILE_BYTES >> 20} MiB; split it"
        raise InvalidArgument(Reason.TOO_MANY, message, field=str(file))
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InvalidArgument(
            Reason.INVALID_TEXT, "it is not UTF-8; convert it first", field=f"{file}:{line}"
        ) from None


# ---- the parts of a case


def _read_view(node: Marked, path: str) -> View:
    text = read_text(node, path)
    return build(node, path, lambda: parse_view(text))


def _read_mask(node: Marked, path: str) -> MaskSpec:
    plain = node.plain()
    if not isinstance(plain, dict):
        node.refuse(
            Reason.MALFORMED, f"{path} is {name_kind(node.value)}; a mask's object is needed, see docs/masks.md"
        )
    return build(node, path, lambda: json_form.parse_json(plain))


def _write_mask(mask: MaskSpec) -> dict[str, Any]:
    """Without what says nothing."""
    written: dict[str, Any] = json.loads(json_form.to_json(mask))
    plain = {"version": VERSION, "edges": [], "empty_row": "ERROR", "replace_native": False}
    order = ("version", "base", "edges", "empty_row", "replace_native")
    return {name: written[name] for name in order if name not in plain or written[name] != plain[name]}


SIDE_FIELDS = ("target", "view", "mask", "allow_leak")


def _read_side(node: Marked, path: str) -> SideSpec:
    """A target alone, or an object with its view and mask."""
    if isinstance(node.value, str):
        return SideSpec(_read_target(node, path))
    found = read_object(node, path, SIDE_FIELDS, ("target",))
    variant = Variant(
        _read_view(found["view"], f"{path}.view") if "view" in found else BASE,
        _read_mask(found["mask"], f"{path}.mask") if "mask" in found else None,
        FLAG.read(found["allow_leak"], f"{path}.allow_leak") if "allow_leak" in found else False,
    )
    return SideSpec(_read_target(found["target"], f"{path}.target"), variant)


def _read_target(node: Marked, path: str) -> str:
    target = read_text(node, path)
    if not target:
        node.refuse(Reason.EMPTY, f"{path} is empty; write a target like torch:DIR or backend:NAME")
    return target


def _write_side(side: SideSpec) -> str | dict[str, Any]:
    variant = side.variant
    written: dict[str, Any] = {"target": side.target}
    written |= {"view": write_view(variant.view)} if variant.view != BASE else {}
    written |= {"mask": _write_mask(variant.mask)} if variant.mask is not None else {}
    written |= {"allow_leak": True} if variant.allow_leak else {}
    return side.target if len(written) == 1 else written


def _read_tolerance(node: Marked, path: str) -> Tolerance:
    """A profile by its name, or numbers."""
    if isinstance(node.value, str):
        profiles = list_profiles()
        if node.value not in profiles:
            node.refuse(Reason.UNKNOWN_ENUM_VALUE, f"{path} is {node.value!r:.60}, no profile", ", ".join(profiles))
        return profiles[node.value]
    found = read_object(node, path, ("abs", "rel", "name", "source"), ("abs", "rel"))
    numbers = [NUMBER.read(found[name], f"{path}.{name}") for name in ("abs", "rel")]
    name, source = (
        read_text(found[field], f"{path}.{field}") if field in found else default
        for field, default in zip(("name", "source"), GIVEN, strict=True)
    )
    return build(node, path, lambda: Tolerance(name, numbers[0], numbers[1], source))


def _write_tolerance(tolerance: Tolerance) -> str | dict[str, Any]:
    if list_profiles().get(tolerance.name) == tolerance:
        return tolerance.name
    written: dict[str, Any] = {"abs": tolerance.abs_epsilon, "rel": tolerance.rel_epsilon}
    written |= {"name": tolerance.name} if tolerance.name != GIVEN[0] else {}
    return written | ({"source": tolerance.source} if tolerance.source != GIVEN[1] else {})


def list_profiles() -> dict[str, Tolerance]:
    """The profiles by name."""
    return {profile.tolerance.name: profile.tolerance for profile in PROFILES}


GATES = object_of(
    GatePolicy,
    {
        "max_token_mismatches": WHOLE, "score_max_abs_diff": NUMBER, "score_mean_abs_diff": NUMBER,
        "p95_latency_ratio": NUMBER, "min_latency_samples": WHOLE, "latency_required": FLAG,
        "max_failure_rate": NUMBER,
    },
)  # fmt: skip

CASE = object_of(
    Case,
    {
        "name": TEXT,
        "description": TEXT,
        "tags": list_of(TEXT),
        "left": Part(_read_side, _write_side),
        "right": Part(_read_side, _write_side),
        "question": Part(read_question, write_question),
        "tolerance": Part(_read_tolerance, _write_tolerance),
        "gates": GATES,
    },
    fields_of={"gates": "policy"},
)


def _read_case(node: Marked) -> Case:
    named = node.value.get("name") if isinstance(node.value, dict) else None
    path = f"case {named.value}" if named is not None and isinstance(named.value, str) else "the case"
    case: Case = CASE.read(node, path[:120])
    return case


# ---- writing


def write_case(case: Case) -> str:
    """The case as a YAML document. Its revision is the store's own and stands in no file."""
    return yaml.dump(
        CASE.write(case), Dumper=_Writer, sort_keys=False, allow_unicode=True, width=MAX_WIDTH, default_flow_style=False
    )


class _Writer(yaml.SafeDumper):
    """Names stand bare, all other text in quotes or, with several lines, as a block; short lists on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def write_text(self, text: str) -> yaml.ScalarNode:
        if BARE.fullmatch(text) and text.lower() not in WORDS:
            return self.represent_scalar("tag:yaml.org,2002:str", text)
        is_block = "\n" in text.strip("\n") and not OTHER_BREAKS.search(text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if is_block else '"')

    def write_list(self, values: list[Any]) -> yaml.SequenceNode:
        is_short = all(isinstance(one, int | float) or (isinstance(one, str) and BARE.fullmatch(one)) for one in values)
        return self.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=is_short)


_Writer.add_representer(str, _Writer.write_text)
_Writer.add_representer(list, _Writer.write_list)
