"""What came of one row that is read at a few places: its numbers, or the problem that ended it, and the proof.

It must not know questions, queues or the wire.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dualtrace.engine import Readout
from dualtrace.problems import BadNumbers, Internal, Problem, Reason
from dualtrace.questions.answers import Applied, ViewReceipt
from dualtrace.questions.sight import Proof, Sight


@dataclass
class Outcome:
    """Filled readout by readout until the row is complete."""

    problem: Problem | None = None
    readouts: list[Readout] = field(default_factory=list)
    proof: Proof = field(default_factory=Proof)

    def add(self, readout: Readout) -> None:
        self.proof.add(readout)
        if readout.rows.size:
            self.readouts.append(readout)

    def at(self, row: int) -> tuple[Readout, int]:
        """The readout that holds this row, and the row's index in its columns. Raises the problem that stands there."""
        if self.problem is not None:
            raise self.problem
        for readout in self.readouts:
            found = (readout.rows == row).nonzero()[0]
            if found.size:
                if row in readout.bad_rows:
                    message = f"the model's logits hold NaN or infinity after the prompt (row {row})"
                    raise BadNumbers(Reason.NON_FINITE_LOGITS, message)
                return readout, int(found[0])
        raise Internal(Reason.ENGINE_FAILED, f"the engine never read row {row}")

    @property
    def delta_modules(self) -> tuple[str, ...]:
        return self.proof.delta_modules

    def applied(self, sight: Sight) -> Applied | None:
        """The receipt of the row's mask, checked; raises MASK_NOT_APPLIED."""
        return self.proof.check(sight)


def view_receipts(placed: Iterable[tuple[int, Outcome]]) -> tuple[ViewReceipt, ...]:
    """One receipt per variant that got a delta, from (variant, outcome) pairs; all rows of a variant wear the same."""
    modules = {variant: outcome.delta_modules for variant, outcome in placed if outcome.delta_modules}
    return tuple(ViewReceipt(variant, modules[variant]) for variant in sorted(modules))
