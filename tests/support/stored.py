"""Runs, reports and cases as a store gets them, small and all different. It knows values, not the store."""

from __future__ import annotations

from typing import Any

from coordinator.store import new_comparison_id, new_run_id
from dualtrace.compare.gates import DEFAULT_GATES, GateName, GateResult, GateVerdict
from dualtrace.compare.report import CompareReport, SideReport, Verdict
from dualtrace.compare.tolerance import Tolerance
from dualtrace.library import (
    BenchmarkFigures,
    Case,
    ComparisonRecord,
    RunMode,
    RunRecord,
    SideSpec,
)
from dualtrace.model_card import ModelProvenance
from dualtrace.questions.answers import Execution, Usage
from dualtrace.questions.asked import Input, RollingQuestion, TokenizeQuestion, Variant
from dualtrace.runs.run import Run, ScoredItem, StoredProblem, TokenizedEntry
from dualtrace.views import scaled

CREATED = "2026-03-01T12:30:05.250000Z"
PROVENANCE = ModelProvenance(
    model_id="m", revision="", family="llama", weights_digest="sha256:1", tokenizer_digest="sha256:2",
    framework="reference", framework_version="1", dtype="float64", matmul_precision="float64", device="cpu",
    attention_implementation="dense", adapter_digests=(("a", "sha256:3"),),
)  # fmt: skip
QUESTION = RollingQuestion((Input(text="a b"),), variants=(Variant(view=scaled("a", 0.5)),))
PROBLEM = StoredProblem("INTERNAL", "ENGINE_FAILED", "", "it fell over", "")


def make_run(target: str = "backend:a", tokens: int = 3, text: str = "a b", **changed: Any) -> Run:
    """A rolling run of so many tokens, of which the first is unscored."""
    scored = tokens - 1
    item = ScoredItem(
        item=0, variant=0, prefix_token_id=None, prompt_tokens=0, scored_start=1, boundary_token_merged=False,
        windows=None, tokens=(b"\xf0\x9f", *(b"t",) * scored), token_ids=tuple(range(tokens)), char_starts=None,
        char_ends=None, token_logprobs=(None, *(-0.5,) * scored), token_nll=(None, *(0.5,) * scored),
        token_ranks=(None, *(1,) * scored), token_ties=(None, *(0,) * scored), token_kl_base_masked=None,
        token_kl_masked_base=None, token_candidates={1: {1: -0.5, 7: -1.5}}, total_logprob=-0.5 * scored,
        mean_logprob=-0.5, perplexity=1.6487212707001282, is_greedy=True, mrr=1.0, rank1_share=1.0, applied=None,
        document_starts=(), delta_modules=("q_proj",), problem=None,
    )  # fmt: skip
    fields: dict[str, Any] = {
        "created": CREATED, "target": target, "question": RollingQuestion((Input(text=text),)),
        "provenance": PROVENANCE, "entries": (item,), "usage": Usage(tokens, tokens),
        "execution": Execution(0.1, 0.2, 0.3, 0.6, 1, tokens), "complete": True,
    }  # fmt: skip
    return Run(**{**fields, **changed})


def make_record(target: str = "backend:a", *, tokens: int = 3, text: str = "a b", **changed: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "run_id": new_run_id(), "mode": RunMode.SCORE, "target": target, "run": make_run(target, tokens, text),
        "token_debug": None, "benchmark": None, "config_hash": "sha256:c", "input_hash": "sha256:i", "mask_hash": "",
        "mask_shape": "", "mrr": 1.0, "rank1_share": 1.0, "raw_request_ref": "", "raw_response_ref": "",
        "synthetic": False,
    }  # fmt: skip
    return RunRecord(**{**fields, **changed})


def make_full_record(**changed: Any) -> RunRecord:
    """A record in which nothing is absent."""
    tokenized = TokenizeQuestion((Input(text="a b"),))
    entry = TokenizedEntry(0, (b"a", b" b"), (1, 2), (0, 1), (1, 3), None)
    fields: dict[str, Any] = {
        "mode": RunMode.BENCHMARK, "token_debug": make_run(question=tokenized, entries=(entry,)),
        "benchmark": BenchmarkFigures(
            "mock", 2, (9.5,), (1.0, 2.5), 1, PROBLEM, 1.0, 2.5, 2.5, 0.3333333333333333, 12.5, 1600.0
        ),
        "mask_hash": "sha256:m", "mask_shape": "[3,3]", "synthetic": True,
    }  # fmt: skip
    return make_record(**{**fields, **changed})


def make_report(verdict: Verdict = Verdict.ERROR, **changed: Any) -> CompareReport:
    gates = (GateResult(gate, GateVerdict.NOT_APPLICABLE, None, None, "nothing to hold") for gate in GateName)
    fields: dict[str, Any] = {
        "created": CREATED, "question": QUESTION, "left": make_side("backend:a"), "right": make_side("backend:b"),
        "provenance_differences": (), "tolerance": None, "policy": DEFAULT_GATES, "verdict": verdict,
        "reasons": ("both sides failed",), "gates": tuple(gates), "tokens": None, "items": (), "distributions": (),
        "scores": None, "labels": (), "benchmark": None, "reproduce": "dualtrace compare a b",
    }  # fmt: skip
    return CompareReport(**{**fields, **changed})


def make_side(target: str) -> SideReport:
    return SideReport(target, Variant(), PROVENANCE, "sha256:x", Usage(3, 3), None, 0.5, 1.0, 1.0, (), PROBLEM)


def make_comparison(
    left_run_id: str = "",
    right_run_id: str = "",
    case: str = "",
    verdict: Verdict = Verdict.ERROR,
    comparison_id: str = "",
) -> ComparisonRecord:
    comparison_id = comparison_id or new_comparison_id()
    return ComparisonRecord(comparison_id, left_run_id, right_run_id, case, make_report(verdict))


def make_case(name: str = "first", **changed: Any) -> Case:
    fields: dict[str, Any] = {
        "question": QUESTION, "left": SideSpec("backend:a", Variant(view=scaled("a", 0.25))),
        "right": SideSpec("run:run-1"), "tolerance": Tolerance("request", 1e-4, 1e-5, "given by the caller"),
        "tags": ("smoke", "llama"), "description": "a case",
    }  # fmt: skip
    return Case(name, **{**fields, **changed})
