"""Whether this machine is ours: how much of its cores went to others while something was measured.

Two threads on two cores stand still when a third wants to run, so one busy neighbour can cost a factor of ten. It
knows the kernel's account of processor time. It must not know what is measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
QUIET = 0.05  # of all cores; the kernel's own work is about 0.01
PATIENCE_SECONDS = 40.0


@dataclass(frozen=True)
class Account:
    """Processor time so far, in ticks."""

    busy: int  # of the whole machine
    own: int  # of this process and those that it started
    seconds: float

    def others_since(self, earlier: Account) -> float:
        """The share of all cores that went to others."""
        ticks = (self.busy - earlier.busy) - (self.own - earlier.own)
        cores = os.cpu_count() or 1
        return max(0.0, ticks / TICKS_PER_SECOND / cores / max(self.seconds - earlier.seconds, 1e-9))


def read_account() -> Account:
    user, nice, system, _idle, _iowait, interrupts, soft, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    busy = user + nice + system + interrupts + soft + steal
    return Account(busy, _ticks_of(os.getpid()), time.perf_counter())


def _ticks_of(pid: int) -> int:
    """Of a process, its dead children that it waited for, and its living ones."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        children = [child for thread in Path(f"/proc/{pid}/task").iterdir() for child in _children(thread)]
    except FileNotFoundError:
        return 0
    return sum(map(int, fields[11:15])) + sum(_ticks_of(child) for child in children)


def _children(thread: Path) -> list[int]:
    return [int(child) for child in (thread / "children").read_text().split()]


def wait_until_quiet() -> None:
    """Until others leave the cores alone for half a second; after a while it is given up, and the account will tell."""
    end = time.perf_counter() + PATIENCE_SECONDS
    while time.perf_counter() < end:
        before = read_account()
        time.sleep(0.5)
        if read_account().others_since(before) <= QUIET:
            return


def rounds(functions: dict[str, Callable[[], float]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Run the functions in turn, A B A B ..., so that a drifting machine hurts all alike; figures by name, by round.

    A round that others disturbed is run again, at most as often as there are rounds to keep; the least disturbed are
    kept, and OTHERS names the share of the cores that others had in each.
    """
    for _ in range(warm_up):
        for function in functions.values():
            function()
    found: list[tuple[float, dict[str, float]]] = []
    while len(found) < 2 * repeats and sum(others <= QUIET for others, _values in found) < repeats:
        wait_until_quiet()
        before = read_account()
        values = {name: function() for name, function in functions.items()}
        found.append((read_account().others_since(before), values))
    kept = sorted(found, key=lambda one: one[0])[:repeats]
    figures = {name: [values[name] for _others, values in kept] for name in functions}
    return {**figures, OTHERS: [others for others, _values in kept]}


OTHERS = "(others)"


def tell_others(figures: dict[str, list[float]]) -> str:
    """For a note: how much the kept rounds were disturbed."""
    return f"others had up to {max(figures[OTHERS]):.0%} of the cores"
