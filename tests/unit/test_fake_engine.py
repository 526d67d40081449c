"""The fake engine: numbers that show a scheduling fault, and faults where they are asked for."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dualtrace.engine import NOTHING, Batch, Read, Readout, Segment, int_array
from dualtrace.fake import STATES, FakeEngine, FakeSpec, fake_tokenizer, parse_spec, past_states
from dualtrace.problems import InvalidArgument, Problem, Reason
from tests.support.answering import fake_engine, forward_alone, next_logprobs, wanted


def segment(*token_ids: int, start: int = 0, parent: int | None = None) -> Segment:
    return Segment(int_array(token_ids), np.arange(start, start + len(token_ids), dtype=np.int32), parent)


def read(*rows: int, **fields: object) -> Read:
    return Read(int_array(rows), targets=int_array([1] * len(rows)), **fields)  # type: ignore[arg-type]


def run(engine: FakeEngine, batch: Batch, *reads: Read) -> list[Readout]:
    return [readout for step in engine.forward(batch, reads, wanted) for readout in step]


def test_the_logits_depend_on_the_token_itself() -> None:
    assert next_logprobs(fake_engine(), [1, 2, 9])[-1] != next_logprobs(fake_engine(), [1, 3, 9])[-1]


def test_the_logits_depend_on_the_whole_past() -> None:
    assert next_logprobs(fake_engine(), [1, 7, 7, 9])[-1] != next_logprobs(fake_engine(), [2, 7, 7, 9])[-1]


def test_the_logits_depend_on_the_order_of_the_past() -> None:
    assert next_logprobs(fake_engine(), [1, 2, 7, 9])[-1] != next_logprobs(fake_engine(), [2, 1, 7, 9])[-1]


def test_the_logits_never_see_what_comes_later() -> None:
    assert next_logprobs(fake_engine(), [1, 2, 3, 4])[:2] == next_logprobs(fake_engine(), [1, 2, 3])


def test_another_seed_is_another_model() -> None:
    one, two = fake_engine(seed=1), fake_engine(seed=2)
    assert next_logprobs(one, [1, 2, 3]) != next_logprobs(two, [1, 2, 3])
    assert one.card.provenance.digest() != two.card.provenance.digest()


def test_the_same_spec_is_the_same_model_in_every_process() -> None:
    # Written down once: a change would make old runs of the fake engine incomparable with new ones.
    assert next_logprobs(fake_engine(vocab=8), [1, 2])[0] == pytest.approx(-2.565391634608421, abs=1e-12)


def test_pauses_and_steps_are_no_part_of_the_identity() -> None:
    assert fake_engine(step=1, step_ms=1).card.provenance == fake_engine().card.provenance


def test_a_planted_difference_is_part_of_the_identity() -> None:
    assert fake_engine(plant_at=3).card.provenance.digest() != fake_engine().card.provenance.digest()


def test_it_says_that_no_model_stands_behind_it() -> None:
    assert fake_engine().card.provenance.synthetic


def test_its_logits_are_as_wide_as_its_tokenizer_needs() -> None:
    assert FakeEngine().card.vocab_size == fake_tokenizer().size


@pytest.mark.parametrize("step", [1, 2, 3, 7, 100])
def test_the_length_of_a_step_changes_no_number(step: int) -> None:
    assert next_logprobs(fake_engine(step=step), range(20)) == next_logprobs(fake_engine(), range(20))


def test_a_long_segment_advances_a_step_at_a_time() -> None:
    covers = [(readout.start, readout.stop) for readout in forward_alone(fake_engine(step=8), range(20))]
    assert covers == [(0, 8), (8, 16), (16, 20)]


def test_a_child_reads_rows_that_its_parent_computed() -> None:
    batch = Batch((segment(5, 6, 7), segment(8, start=3, parent=0)))
    (answer,) = [r for r in run(fake_engine(), batch, NOTHING, read(0, 2, 3)) if r.segment == 1]
    alone = forward_alone(fake_engine(), [5, 6, 7, 8], read(0, 2, 3))[0]
    assert answer.logprobs is not None
    assert alone.logprobs is not None
    assert np.array_equal(answer.logprobs, alone.logprobs)


def test_a_child_without_tokens_reads_its_parents_rows() -> None:
    batch = Batch((segment(5, 6, 7), Segment(int_array([]), int_array([]), parent=0)))
    (answer,) = [r for r in run(fake_engine(), batch, NOTHING, read(2)) if r.segment == 1]
    assert (answer.computed_tokens, answer.rows.tolist()) == (0, [2])


def test_a_segment_that_nobody_wants_any_more_stops_between_steps() -> None:
    engine = fake_engine(step=4)
    asked: list[int] = []

    def live(index: int) -> bool:
        asked.append(index)
        return len(asked) < 3

    steps = list(engine.forward(Batch((segment(*range(40)),)), (read(39),), live))
    assert len(steps) == engine.steps == 2


def test_the_planted_row_of_nan_is_reported_as_bad_and_no_other() -> None:
    (answer,) = forward_alone(fake_engine(nan_at=2), range(5))
    assert answer.bad_rows == (2,)
    assert answer.logprobs is not None
    assert np.isfinite(answer.logprobs[[0, 1, 3]]).all()


def test_a_planted_difference_moves_its_row_alone() -> None:
    plain, planted = next_logprobs(fake_engine(), range(6)), next_logprobs(fake_engine(plant_at=3), range(6))
    assert [a == b for a, b in zip(plain, planted, strict=True)] == [True, True, True, False, True]


def test_a_planted_failure_raises_at_its_row() -> None:
    with pytest.raises(RuntimeError, match="row 3"):
        forward_alone(fake_engine(fail_at=3), range(6))


def test_a_segment_above_the_planted_memory_runs_out_of_it() -> None:
    engine = fake_engine(oom_tokens=10)
    assert len(next_logprobs(engine, range(10))) == 9
    with pytest.raises(MemoryError):
        next_logprobs(engine, range(11))


def test_a_pause_per_step_is_kept() -> None:
    begun = time.perf_counter()
    forward_alone(fake_engine(step=2, step_ms=5), range(8))
    assert time.perf_counter() - begun >= 4 * 0.005


def test_a_long_text_costs_its_length_and_not_its_square() -> None:
    begun = time.perf_counter()
    forward_alone(fake_engine(vocab=8, step=16), [1] * 40_000, read(39_999))
    assert time.perf_counter() - begun < 5  # by the square it takes a minute


def test_every_past_has_a_state() -> None:
    states = past_states(int_array(range(1000)))
    assert 0 <= int(states.min()) <= int(states.max()) < STATES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", FakeSpec()),
        ("vocab=64", FakeSpec(vocab=64)),
        ("vocab=64,seed=3,step_ms=2.5,", FakeSpec(vocab=64, seed=3, step_ms=2.5)),
        ("nan_at=-1", FakeSpec()),
        ("plant=-0.5", FakeSpec(plant=-0.5)),
    ],
)
def test_a_spec_is_read_as_written(text: str, expected: FakeSpec) -> None:
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    ("text", "reason", "field"),
    [
        ("colour=red", Reason.MALFORMED, "target"),
        ("vocab", Reason.MALFORMED, "target"),
        ("vocab=", Reason.MALFORMED, "target"),
        ("vocab=many", Reason.MALFORMED, "target"),
        ("vocab=1.5", Reason.MALFORMED, "target"),
        ("vocab=1e400", Reason.MALFORMED, "target"),
        ("plant=nan", Reason.MALFORMED, "target"),
        ("vocab=-1", Reason.OUT_OF_RANGE, "fake:vocab"),
        ("seed=-1", Reason.OUT_OF_RANGE, "fake:seed"),
        ("step=0", Reason.OUT_OF_RANGE, "fake:step"),
        ("positions=0", Reason.OUT_OF_RANGE, "fake:positions"),
        ("step_ms=-1", Reason.OUT_OF_RANGE, "fake:step_ms"),
    ],
)
def test_a_spec_that_means_nothing_is_refused_by_name(text: str, reason: Reason, field: str) -> None:
    with pytest.raises(Problem) as caught:
        parse_spec(text)
    assert isinstance(caught.value, InvalidArgument)
    assert (caught.value.reason, caught.value.detail.field) == (reason, field)
