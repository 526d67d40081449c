"""The torch readout's sums over a real vocabulary, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dualtrace.arrays import FloatArray
from dualtrace.engine import Read, int_array
from tests.support.tolerances import LOGSUMEXP_FLOAT32

pytestmark = pytest.mark.torch

VOCABULARY = 49_152 + 77  # runs of the blocked sum, and a rest
ROWS = 40


def logits_of(seed: int, spread: float) -> Any:
    """[ROWS, V] float32 like those of a language model: a few ids stand out."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    values = torch.randn((ROWS, VOCABULARY), generator=draw) * spread
    return values + 12 * (torch.rand((ROWS, VOCABULARY), generator=draw) > 0.9999)


def read(source: Any, against: bool = False) -> Any:
    """Rows ROWS.. of the source read for target 0, the first ROWS are the yardstick."""
    from backend_torch.readout import Ask, read_all

    places = np.arange(ROWS) + (ROWS if against else 0)
    rows = int_array(range(ROWS))
    ask = Ask(Read(rows, targets=np.zeros(ROWS, np.int32)), places, np.arange(ROWS) if against else None)
    read_all(lambda hidden, _out: hidden.clone(), source, [ask])
    return ask


def divergence(left: Any, right: Any) -> FloatArray:
    """[ROWS] KL(left || right) in float64."""
    p, q = left.double().log_softmax(1), right.double().log_softmax(1)
    found: FloatArray = (p.exp() * (p - q)).sum(1).numpy()
    return found


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_logprobs_are_those_of_float64(spread: float) -> None:
    logits = logits_of(1, spread)
    wanted = logits.double().log_softmax(1)[:, 0].numpy()
    assert float(np.abs(read(logits).column("logprobs") - wanted).max()) <= LOGSUMEXP_FLOAT32.abs_epsilon


@pytest.mark.parametrize("change", [1e-3, 0.1, 2.0])
def test_divergences_both_ways_are_those_of_float64(change: float) -> None:
    import torch

    base = logits_of(1, 2.0)
    masked = base + change * logits_of(2, 1.0)
    ask = read(torch.cat([base, masked]), against=True)
    for name, wanted in (
        ("kl_from_against", divergence(base, masked)),
        ("kl_to_against", divergence(masked, base)),
    ):
        allowed = LOGSUMEXP_FLOAT32.abs_epsilon + LOGSUMEXP_FLOAT32.rel_epsilon * wanted
        assert float((np.abs(ask.column(name) - wanted) - allowed).max()) <= 0


def test_equal_rows_have_no_divergence_at_all() -> None:
    import torch

    logits = logits_of(1, 2.0)
    ask = read(torch.cat([logits, logits]), against=True)
    assert not ask.column("kl_from_against").any()
    assert not ask.column("kl_to_against").any()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["own", "yardstick"])
def test_a_broken_logit_breaks_its_row_and_no_other(side: str, broken: float) -> None:
    import torch

    base, masked = logits_of(1, 2.0), logits_of(2, 2.0)
    (masked if side == "own" else base)[7, -1] = broken
    ask = read(torch.cat([base, masked]), against=True)
    assert ask.bad_rows == [7]
    assert np.flatnonzero(np.isnan(ask.column("kl_from_against"))).tolist() == [7]


MANY_ROWS, FEW_IDS = 330, 97  # more rows than any chunk or block holds, and not a multiple of either


@pytest.mark.parametrize("chunk", [128, 256])
def test_rows_of_many_asks_read_chunk_by_chunk_are_each_their_own(chunk: int) -> None:
    """A long text, one row, and three variants in lockstep with one yardstick: chunks hold parts of several asks."""
    import torch

    from backend_torch.readout import Ask, read_all

    source = 3 * torch.randn((2 * MANY_ROWS, FEW_IDS), generator=torch.Generator().manual_seed(3))
    theirs = np.arange(MANY_ROWS)
    ids = int_array([row % FEW_IDS for row in range(MANY_ROWS)])
    asks = []
    for number, count in enumerate((MANY_ROWS, 1, 150, 150, 150)):
        places = MANY_ROWS + (theirs[:count] * 7 + number) % MANY_ROWS
        asks.append(
            Ask(Read(int_array(range(count)), targets=ids[:count]), places, theirs[:count] if number > 1 else None)
        )
    read_all(lambda hidden, _out: hidden.clone(), source, asks, chunk)
    wanted = source.double().log_softmax(1)
    for ask in asks:
        own = wanted[torch.from_numpy(ask.places), torch.from_numpy(ids[: len(ask.places)].astype(np.int64))].numpy()
        assert float(np.abs(ask.column("logprobs") - own).max()) <= LOGSUMEXP_FLOAT32.abs_epsilon
        if ask.against is not None:
            kl = divergence(source[ask.against], source[torch.from_numpy(ask.places)])
            allowed = LOGSUMEXP_FLOAT32.abs_epsilon + LOGSUMEXP_FLOAT32.rel_epsilon * kl
            assert float((np.abs(ask.column("kl_from_against") - kl) - allowed).max()) <= 0


def test_a_chunk_of_a_large_vocabulary_holds_fewer_rows() -> None:
    from backend_torch.readout import chunk_rows

    assert chunk_rows(49_152) == 2 * chunk_rows(262_144)
