"""From targets as a file in a repository spells them to targets of this machine.

`${NAME}` stands for a value given with the run or in the environment; a folder that is not absolute is meant from
where the case file stands. It knows the grammar of targets. It must not open any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dualtrace.engine_registry import list_engines
from dualtrace.library import Case, SideSpec
from dualtrace.problems import InvalidArgument, Reason

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_VARIABLE = re.compile(r"\$(?:\{([^{}]*)\}|\$)?")
WITHOUT_FOLDER = {"fake"}


def fill_case(case: Case, values: Mapping[str, str], folder: Path) -> Case:
    """The case with both sides' targets as they are meant here."""
    left, right = (
        replace(side, target=fill_target(side.target, values, folder, f"{case.name}.{name}"))
        for name, side in (("left", case.left), ("right", case.right))
    )
    return replace(case, left=left, right=right)


def fill_target(target: str, values: Mapping[str, str], folder: Path, field: str) -> str:
    filled = _VARIABLE.sub(lambda match: _look_up(match, values, field), target)
    kind, colon, rest = filled.partition(":")
    if colon and kind in list_engines() and kind not in WITHOUT_FOLDER:
        return f"{kind}:{_place(rest, folder)}" if rest else filled
    if filled.endswith(".json") and not re.match(r"[a-z]+:", filled):
        return _place(filled, folder)
    return filled


def _look_up(match: re.Match[str], values: Mapping[str, str], field: str) -> str:
    if match[0] == "$$":
        return "$"
    name = match[1]
    if name is None or not NAME.fullmatch(name):
        message = f"{match[0]!r:.60} stands in the target; write ${{NAME}}, or $$ for a dollar sign"
        raise InvalidArgument(Reason.MALFORMED, message, field=field)
    if name not in values:
        message = f"the target needs a value for ${{{name}}}; give --set {name}=VALUE or set it in the environment"
        raise InvalidArgument(Reason.MISSING, message, field=field)
    return values[name]


def _place(path: str, folder: Path) -> str:
    """`~` is the home folder, as in a shell; an absolute path stays."""
    return str(folder / Path(path).expanduser())


def used_names(case: Case) -> tuple[str, ...]:
    """The names that its targets need values for, in order, each once."""
    found = [match[1] for side in (case.left, case.right) for match in _VARIABLE.finditer(side.target) if match[1]]
    return tuple(dict.fromkeys(found))


def parse_values(given: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` each."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not NAME.fullmatch(name):
            message = f"{text!r:.80} is not understood; write NAME=VALUE, the name of letters, digits and underscores"
            raise InvalidArgument(Reason.MALFORMED, message, field="--set")
        if name in found:
            raise InvalidArgument(Reason.DUPLICATE, f"{name} is given twice", field="--set")
        found[name] = value
    return found


def needs_coordinator(side: SideSpec) -> bool:
    """Whether only a coordinator knows who answers."""
    return side.target.startswith(("backend:", "run:"))
