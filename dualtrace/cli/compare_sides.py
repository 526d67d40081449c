"""The two sides of a comparison on a command line: their options, and how a target becomes somebody who answers.

Engines over a checkpoint run as child sidecars, all started at once; everything else is opened in this process. It
knows targets and processes. It must not know questions or reports.
"""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.coordinator_link import ADDRESS_VARIABLE, CREDENTIALS, DEFAULT_ADDRESS, default_address
from dualtrace.cli.inputs import FILE, FOLDER, STDIN_OR_FILE, Ask, command_options
from dualtrace.cli.mask_files import MaskFile, read_mask
from dualtrace.cli.output import Tell
from dualtrace.cli.sights import Sights, parse_view
from dualtrace.problems import InvalidArgument, Problem, Reason, rebuild

if TYPE_CHECKING:
    from dualtrace.card import Card
    from dualtrace.cli.child_sidecar import ChildSidecar, ChildSpec
    from dualtrace.questions.answers import AnswerEvent
    from dualtrace.questions.asked import Question, Variant
    from dualtrace.scorer import Scorer
    from dualtrace.targets import Target

Function = Callable[..., Any]

START_SECONDS = 600.0
IN_PROCESS = {"fake", "py"}  # kinds whose engine computes here, in a thread of its own


@dataclass(frozen=True, eq=False)
class SideAsked:
    """One side as written."""

    target: Target
    ask: Ask
    sights: Sights
    stored_variant: int | None = None
    coordinator: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """Sides of one key are answered by one Scorer, in one batch where it can."""
        ask = self.ask
        options = (ask.dtype, ask.device, ask.adapters, ask.tokenizer, ask.threads)
        return (str(self.target), options, self.stored_variant)

    @property
    def names_sight(self) -> bool:
        """Whether a view or a mask was asked, rather than left out."""
        return bool(self.sights.masks or self.sights.views)

    def without_tls(self) -> SideAsked:
        return replace(self, ask=replace(self.ask, ca_file=None, certificate=None, key=None))

    async def variant(self, scorer: Scorer, deadline: float | None) -> Variant:
        return (await self.sights.variants(scorer, deadline))[0]


@dataclass(frozen=True, eq=False)
class SidesAsked:
    left: SideAsked
    right: SideAsked
    timeout_seconds: float | None
    start_seconds: float
    as_json: bool

    @property
    def both(self) -> tuple[SideAsked, SideAsked]:
        return self.left, self.right

    @property
    def files_from_stdin(self) -> int:
        return len({id(mask) for side in self.both for mask in side.sights.masks if mask.path == "-"})

    @property
    def needs_coordinator(self) -> bool:
        return any(side.target.kind == "backend" for side in self.both)


class AbsentScorer:
    """A side that could not be opened: every question is answered with the reason."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    async def describe(self) -> Card:
        raise self._again()

    def ask(self, question: Question, *, deadline: float | None = None) -> AsyncIterator[AnswerEvent]:
        raise self._again()

    async def close(self) -> None:
        """Nothing was opened."""

    def _again(self) -> Problem:
        return rebuild(self._problem.code, self._problem.detail)


@dataclass
class Children:
    """Sidecars that were started for the sides, by the sides' keys."""

    started: dict[tuple[object, ...], ChildSidecar] = field(default_factory=dict)
    ready: dict[tuple[object, ...], Target | Problem] = field(default_factory=dict)

    def find(self, side: SideAsked) -> ChildSidecar | None:
        return self.started.get(side.key)

    def await_all(self, timeout_seconds: float, tell: Tell) -> None:
        """Outside of any event loop, so that Ctrl-C ends it at once. One that fails leaves the other its chance."""
        from dualtrace.targets import Target

        for key, child in self.started.items():
            tell(f"waiting for {child.spec.engine}:{child.spec.model}")
            try:
                self.ready[key] = Target("grpc", child.await_ready(timeout_seconds))
            except Problem as problem:
                self.ready[key] = problem

    def target_of(self, side: SideAsked) -> Target | Problem:
        """Who answers for the side: its sidecar, or why there is none, or the target itself."""
        return self.ready.get(side.key, side.target)

    def failed_to_start(self, side: SideAsked) -> bool:
        return isinstance(self.ready.get(side.key), Problem)


@contextmanager
def start_children(sides: Sequence[SideAsked]) -> Iterator[Children]:
    """A sidecar for each engine that a side names; all end with the block."""
    from dualtrace.cli.child_sidecar import child_sidecars

    wanted = {side.key: side for side in sides if side.target.is_engine}
    for side in wanted.values():
        _check_folder(side.target)
    specs = [_spec(side) for side in wanted.values()]
    with child_sidecars(specs) as children:
        yield Children(dict(zip(wanted, children, strict=True)))


def _check_folder(target: Target) -> None:
    """Asked first: a wrong path is the caller's mistake, and no side that failed."""
    if not Path(target.rest).is_dir():
        message = f"{target} names no folder; give the folder of a checkpoint"
        raise InvalidArgument(Reason.NOT_FOUND, message, field="target")


def _spec(side: SideAsked) -> ChildSpec:
    from dualtrace.cli.child_sidecar import ChildSpec

    options = side.ask.target_options()
    return ChildSpec(
        engine=side.target.kind,
        model=Path(side.target.rest),
        threads=options.threads,
        dtype=options.dtype,
        device=options.device,
        adapters=options.adapters,
        tokenizer=options.tokenizer,
    )


@asynccontextmanager
async def open_sides(asked: SidesAsked, children: Children) -> AsyncIterator[tuple[Scorer, Scorer]]:
    """Both sides' Scorers, the same one where the sides are the same; closed with the block.

    A side that cannot be reached is an AbsentScorer; a mistake in how it was asked is raised. Engines in this process
    are left to `close_own`.
    """
    async with AsyncExitStack() as stack:
        opened: dict[tuple[object, ...], Scorer] = {}
        for side in asked.both:
            if side.key not in opened:
                scorer = opened[side.key] = await _open(side, children.target_of(side))
                if not _is_in_process(side):
                    stack.push_async_callback(scorer.close)
        yield opened[asked.left.key], opened[asked.right.key]


async def close_own(asked: SidesAsked, scorers: Sequence[Scorer]) -> None:
    """Close the engines in this process. Not to be called where one may be in a step that never ends: its thread is a
    daemon, and goes with us."""
    for side, scorer in zip(asked.both, scorers, strict=True):
        if _is_in_process(side):
            await scorer.close()


def _is_in_process(side: SideAsked) -> bool:
    return side.target.kind in IN_PROCESS


async def _open(side: SideAsked, target: Target | Problem) -> Scorer:
    from dualtrace.targets import open_target

    if isinstance(target, Problem):
        return AbsentScorer(target)
    options = replace(side.ask.target_options(), variant=side.stored_variant, coordinator=side.coordinator)
    if target is not side.target:  # our own child: what it was told it knows, and it takes no token
        options = replace(options, adapters=(), dtype="", device="", tokenizer=None, token=None, ca_file=None,
                          certificate_file=None, key_file=None)  # fmt: skip
    try:
        return await open_target(target, options)
    except InvalidArgument:
        raise
    except Problem as problem:
        return AbsentScorer(problem)


def side_options(*, live: bool) -> Callable[[Function], Function]:
    """LEFT, RIGHT and what either may need; the function gets one `sides`. Not `live`: stored answers alone."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def command(**given: Any) -> Any:
            own = {name: given.pop(name) for name in tuple(given) if name in _NAMES}
            return function(sides=read_sides(**own), **given)

        wrapped: Function = command_options(command)
        options: tuple[Callable[[Function], Function], ...] = _ARGUMENTS if live else _STORED_ARGUMENTS
        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped

    return decorate


def read_sides(left: str, right: str | None, **given: Any) -> SidesAsked:
    from dualtrace.targets import COORDINATED, parse_target

    target = parse_target(left)
    other = target if right is None else parse_target(right)
    masks: dict[str, MaskFile] = {}  # by path: standard input can be read once, for both sides
    sides = [_read_side(one, name, given, masks) for one, name in ((target, "left"), (other, "right"))]
    if given.get("allow_leak") and not masks:
        message = "--allow-leak is about masks, and none was given; leave it out"
        raise InvalidArgument(Reason.CONFLICT, message, field="--allow-leak")
    kinds = {side.target.kind for side in sides}
    if "grpc" in kinds and kinds & {"grpcs", *COORDINATED}:  # certificates are for the others
        sides = [side.without_tls() if side.target.kind == "grpc" else side for side in sides]
    if "backend" in kinds and not kinds <= COORDINATED:
        message = (
            f"{sides[0].target} and {sides[1].target} cannot be compared: a backend is asked by its coordinator, which"
            " knows no other target than backend: and run:; give both sides so, or neither"
        )
        raise InvalidArgument(Reason.CONFLICT, message, field="target")
    return SidesAsked(
        sides[0],
        sides[1],
        given.get("timeout_seconds"),
        given.get("start_seconds") or START_SECONDS,
        given.get("as_json", False),
    )


def _read_side(target: Target, name: str, given: dict[str, Any], masks: dict[str, MaskFile]) -> SideAsked:
    from dualtrace.targets import COORDINATED

    def own(option: str) -> Any:
        """The side's own option, or else that of both."""
        value = given.get(f"{name}_{option}")
        return given.get(option) if value in (None, ()) else value

    ask = Ask(
        target=str(target), threads=given.get("threads") or 1, dtype=own("dtype") or "", device=own("device") or "",
        adapters=own("adapters") or (), tokenizer=own("tokenizer"), timeout_seconds=given.get("timeout_seconds"),
        **_read_credentials(given, is_coordinated=target.kind in COORDINATED),
    )  # fmt: skip
    if not target.is_engine and target.kind in {"file", *COORDINATED}:
        ask = replace(ask, adapters=(), dtype="", device="", tokenizer=None)  # a stored answer computes nothing
    path, view = own("mask"), own("view")
    if path and path not in masks:
        masks[path] = read_mask(path)
    sights = Sights(
        (masks[path],) if path else (), (parse_view(view),) if view else (), bool(given.get("allow_leak") and path)
    )
    return SideAsked(target, ask, sights, given.get(f"{name}_variant"), given.get("coordinator") or default_address())


def _read_credentials(given: dict[str, Any], *, is_coordinated: bool) -> dict[str, Any]:
    """Of the flags; of the environment too where the coordinator is asked, for it speaks of no sidecar."""
    known: dict[str, str | None] = {}
    if is_coordinated:
        known = {name: os.environ.get(variable) for name, variable in CREDENTIALS.items()}
    return {name: given.get(name) or (Path(file) if (file := known.get(name)) else None) for name in CREDENTIALS}


_BOTH_AND_EACH: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("--mask", "mask", {"type": STDIN_OR_FILE, "metavar": "FILE.json", "help": "Mask, as docs/masks.md says"}),
    ("--view", "view", {"metavar": "VIEW", "help": "View: base, finetuned:NAME, scaled:NAME:LAMBDA, null:NAME:SEED"}),
    ("--adapter", "adapters", {"multiple": True, "metavar": "NAME=DIR", "help": "PEFT adapter of an engine"}),
    ("--dtype", "dtype", {"help": "Number type of an engine"}),
    ("--device", "device", {"help": "Where an engine computes"}),
    ("--tokenizer", "tokenizer", {"type": FOLDER, "help": "Tokenizer of a target that has none"}),
)  # fmt: skip


def _each(flag: str, name: str, settings: dict[str, Any]) -> list[Callable[[Function], Function]]:
    """One option for both sides and one for each."""
    text = settings["help"]
    made: list[Callable[[Function], Function]]
    made = [click.option(flag, name, **{**settings, "help": f"{text}, on both sides."})]
    for side in ("left", "right"):
        own = {**settings, "help": f"{text}, on the {side} alone."}
        made.append(click.option(f"--{side}-{flag[2:]}", f"{side}_{name}", **own))
    return made


_CONNECTING: tuple[Callable[[Function], Function], ...] = (
    click.option("--coordinator", metavar="HOST:PORT",
                 help=f"The coordinator that knows run:ID and backend:NAME; default: ${ADDRESS_VARIABLE}, else "
                 f"{DEFAULT_ADDRESS}."),
    *(
        click.option(f"--{name.replace('_', '-')}", type=FILE, help=f"{text}; coordinator: or ${CREDENTIALS[name]}.")
        for name, text in (
            ("token_file", "File with the bearer token for sidecars and coordinator"),
            ("ca_file", "PEM file of the authority to trust, for TLS"),
            ("certificate", "PEM file of our own certificate, for mutual TLS"),
            ("key", "PEM file of that certificate's private key"),
        )
    ),
)  # fmt: skip

_VARIANTS = tuple(
    click.option(f"--{side}-variant", f"{side}_variant", type=click.IntRange(min=0), metavar="N",
                 help=f"Which variant of a stored run on the {side}; needed where it holds several.")
    for side in ("left", "right")
)  # fmt: skip

_TIMEOUT = click.option("--timeout", "timeout_seconds", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
                        help="Give up on a side after so long; without it, wait as long as it takes.")  # fmt: skip

_ARGUMENTS: tuple[Callable[[Function], Function], ...] = (
    click.argument("left"),
    click.argument("right", required=False),
    *(option for flag, name, settings in _BOTH_AND_EACH for option in _each(flag, name, settings)),
    click.option("--allow-leak", is_flag=True, help="Read rows that see the token they predict."),
    click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of an engine."),
    _TIMEOUT,
    click.option("--start-timeout", "start_seconds", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
                 help=f"Give up on an engine that is not ready after so long; default: {START_SECONDS:g}."),
    *_VARIANTS,
    *_CONNECTING,
)  # fmt: skip
_STORED_ARGUMENTS: tuple[Callable[[Function], Function], ...] = (
    click.argument("left"),
    click.argument("right"),
    *_VARIANTS,
    *_CONNECTING,
)

SIDE_NAMES = (
    {"allow_leak", "threads", "left_variant", "right_variant"}
    | {name for _, name, _ in _BOTH_AND_EACH}
    | {f"{side}_{name}" for _, name, _ in _BOTH_AND_EACH for side in ("left", "right")}
)  # fmt: skip
CONNECTING_NAMES = {"timeout_seconds", "start_seconds", "coordinator", *CREDENTIALS}
_NAMES = SIDE_NAMES | CONNECTING_NAMES | {"left", "right", "as_json"}
