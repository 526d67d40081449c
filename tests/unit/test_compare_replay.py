"""The replay vectors: two sequences of events and what comparing them gives; and a planted fault that they catch."""

import copy
from typing import Any

import pytest

from dualtrace.compare.gates import GatePolicy, GateVerdict
from dualtrace.compare.report import CompareReport, read_report, report_to_text
from dualtrace.compare.sides import SideName
from dualtrace.compare.tolerance import request_tolerance
from tests.support.compared import Compared, compare, read_events, rolling
from tests.support.vectors import Case, cases, load


def replay(case: Case) -> Compared:
    return compare(
        read_events(case["left"], SideName.LEFT),
        read_events(case["right"], SideName.RIGHT),
        rolling(case["items"]),
        request_tolerance(**case["tolerance"]),
        GatePolicy(**case.get("policy", {})),
    )


def observe(report: CompareReport) -> dict[str, Any]:
    """What a vector may promise, under its names."""
    tokens = report.tokens
    assert tokens is not None
    parted, loss, ranks = tokens.first_id_mismatch, tokens.token_loss_diff_summary, tokens.rank_delta_summary
    sides = {"LEFT": report.left, "RIGHT": report.right}
    return {
        "verdict": report.verdict.value,
        "statuses": [[status.value for status in item.columns.statuses] for item in report.items],
        "aligned": tokens.aligned_count,
        "mismatches": tokens.token_mismatch_count,
        "unscored": tokens.unscored_count,
        "unavailable": tokens.unavailable_count,
        "first_divergence": _place(tokens.first_divergence_item, tokens.first_divergence_index),
        "region": None if tokens.first_divergence_region is None else [*tokens.first_divergence_region],
        "first_id_mismatch": None if parted is None else {
            "item": parted.item, "index": parted.index, "left_id": parted.left_id, "right_id": parted.right_id,
            "left_piece": _text(parted.left_piece), "right_piece": _text(parted.right_piece),
        },
        "max_abs_diff": None if tokens.max_token_abs_diff is None else [
            tokens.max_token_abs_diff, tokens.max_token_abs_diff_item, tokens.max_token_abs_diff_index,
        ],
        "mean_abs_diff": None if loss is None else loss.mean,
        "signed_mean": None if loss is None else loss.signed_mean,
        "min_abs_epsilon": tokens.min_abs_epsilon,
        "ranks": None if ranks is None else {
            "mrr_left": ranks.mrr_left, "mrr_right": ranks.mrr_right, "mrr_delta": ranks.mrr_delta,
            "worst_rank_drop": ranks.worst_rank_drop, "worst_rank_drop_index": ranks.worst_rank_drop_index,
            "changed": ranks.changed,
        },
        "failed_gates": [gate.gate.value for gate in report.gates if gate.verdict is GateVerdict.FAIL],
        "failed_sides": [name for name, side in sides.items() if side.problem is not None],
    }  # fmt: skip


def _place(item: int | None, index: int | None) -> list[int | None] | None:
    return None if item is None else [item, index]


def _text(piece: bytes | None) -> str | None:
    return None if piece is None else piece.decode()


def find_broken_promises(case: Case) -> dict[str, tuple[Any, Any]]:
    """Promise -> (promised, found), of those that are not kept."""
    found = observe(replay(case).report)
    return {name: (wanted, found[name]) for name, wanted in case["expected"].items() if found[name] != wanted}


@cases("replay/tokens")
def test_a_replay_gives_what_the_vector_promises(case: Case) -> None:
    assert find_broken_promises(case) == {}


@cases("replay/tokens")
def test_the_report_of_a_replay_survives_its_document(case: Case) -> None:
    text = report_to_text(replay(case).report)
    assert report_to_text(read_report(text)) == text


@cases("replay/tokens")
def test_a_vector_with_another_verdict_is_not_kept(case: Case) -> None:
    changed = copy.deepcopy(case)
    changed["expected"]["verdict"] = "FAIL" if case["expected"]["verdict"] != "FAIL" else "PASS"
    assert set(find_broken_promises(changed)) == {"verdict"}


def test_a_vector_whose_number_was_changed_is_not_kept() -> None:
    case = copy.deepcopy(next(one for one in load("replay/tokens")["cases"] if one["name"] == "equal sides pass"))
    case["right"][2]["chunk"]["logprobs"][1] = -3.0000000000000004
    broken = find_broken_promises(case)
    assert {"verdict", "statuses", "mismatches", "first_divergence", "failed_gates"} <= set(broken)
    assert broken["first_divergence"] == (None, [0, 3])


@pytest.mark.parametrize("verdict", ["PASS", "FAIL", "INCOMPARABLE", "ERROR"])
def test_every_verdict_has_a_vector(verdict: str) -> None:
    assert any(case["expected"]["verdict"] == verdict for case in load("replay/tokens")["cases"])
