"""The Scorers of many comparisons in one process: each target is opened once, engines as sidecars of their own.

It knows targets and child sidecars. It must not know cases or what is compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from dualtrace.cli.child_sidecar import ChildSidecar, ChildSpec, child_sidecars
from dualtrace.cli.compare_sides import IN_PROCESS, AbsentScorer
from dualtrace.client import Client, Connection
from dualtrace.problems import InvalidArgument, Problem, Reason, Unavailable
from dualtrace.scorer import Scorer
from dualtrace.targets import Target, TargetOptions, open_target, parse_target


@dataclass
class Doors:
    """Targets and what stands behind them, while the block lasts."""

    options: TargetOptions
    children: dict[str, ChildSidecar] = field(default_factory=dict)
    opened: dict[str, Scorer] = field(default_factory=dict)

    async def open(self, target: str) -> Scorer:
        """The Scorer of a target; the second time the same one, so that two views of it share a batch.

        One that cannot be reached is an AbsentScorer; a mistake in how it is written is raised.
        """
        child = self.children.get(target)
        if child is not None and child.has_ended:
            message = f"the sidecar of {target} has ended; it said:\n{child.last_words() or 'nothing'}"
            return AbsentScorer(Unavailable(Reason.UNREACHABLE, message, field="target"))
        if target not in self.opened:
            try:
                self.opened[target] = await self._open(target, child)
            except InvalidArgument:
                raise
            except Problem as problem:
                return AbsentScorer(problem)
        return self.opened[target]

    def abandon(self, target: str) -> None:
        """Its engine did not answer in time. One in this process may be in a step that never ends: it is left to end
        with us, and whoever asks the target again gets another."""
        if target in self.opened and parse_target(target).kind in IN_PROCESS:
            del self.opened[target]

    async def close(self, *, is_orderly: bool) -> None:
        """Engines in this process are closed after an orderly end alone: their threads may be in a long step."""
        for target, scorer in self.opened.items():
            if is_orderly or parse_target(target).kind not in IN_PROCESS:
                await scorer.close()

    async def _open(self, target: str, child: ChildSidecar | None) -> Scorer:
        if child is not None:
            address = await asyncio.to_thread(child.await_ready)
            return Client(Connection(address))
        return await open_target(parse_target(target), self._plain_options())

    def _plain_options(self) -> TargetOptions:
        """Without what is meant for engines: a mixed run has sides that take none of it."""
        return replace(self.options, adapters=(), dtype="", device="")


@asynccontextmanager
async def open_doors(targets: Iterable[str], options: TargetOptions) -> AsyncIterator[Doors]:
    """Engines among the targets are started at once, side by side; all are ended with the block."""
    engines = {text: target for text in dict.fromkeys(targets) if (target := _parse(text)) and target.is_engine}
    with ExitStack() as stack:
        specs = [_child_spec(target, options) for target in engines.values()]
        children = stack.enter_context(child_sidecars(specs))
        doors = Doors(options, dict(zip(engines, children, strict=True)))
        is_orderly = False
        try:
            yield doors
            is_orderly = True
        finally:
            await doors.close(is_orderly=is_orderly)


def _parse(text: str) -> Target | None:
    """None for what is no target: that is told by the case that names it."""
    try:
        return parse_target(text)
    except Problem:
        return None


def _child_spec(target: Target, options: TargetOptions) -> ChildSpec:
    """A wrong path is told before anything is started: it is the caller's mistake, and no side that failed."""
    if not Path(target.rest).is_dir():
        message = f"{target} names no folder; give the folder of a checkpoint"
        raise InvalidArgument(Reason.NOT_FOUND, message, field="target")
    return ChildSpec(
        target.kind,
        Path(target.rest),
        threads=options.threads,
        dtype=options.dtype,
        device=options.device,
        adapters=options.adapters,
        tokenizer=options.tokenizer,
    )
