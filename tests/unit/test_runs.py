"""Runs: what is written can be read, reading and writing again changes nothing, and what is no run is refused."""

import asyncio
import contextlib
import dataclasses
import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtrace.engine_scorer import EngineScorer
from dualtrace.fake import FakeEngine, fake_tokenizer, parse_spec
from dualtrace.masks.spec import Alignment, CharRange, Edge, MaskSpec, Named, SegmentName, Sliding, TokenRange
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import BadNumbers, Internal, InvalidArgument, Problem, Reason
from dualtrace.questions.answers import (
    AnswerHeader,
    AnswerSummary,
    Applied,
    Execution,
    ItemDone,
    ItemHeader,
    ItemProblem,
    MaskMetadata,
    MaskReceipt,
    NextTokenAnswer,
    NextTokenResult,
    NextTokens,
    Tail,
    TokenChunk,
    Usage,
)
from dualtrace.questions.asked import (
    Input,
    LogprobItem,
    LogprobQuestion,
    MaskedForwardQuestion,
    NextTokenQuestion,
    RollingQuestion,
    ScoreQuestion,
    TokenizeQuestion,
    Variant,
)
from dualtrace.runs.collector import RunCollector
from dualtrace.runs.run import (
    AskedQuestion,
    Run,
    ScoredItem,
    read_run,
    restore_problem,
    run_to_text,
    store_problem,
    write_run,
)
from dualtrace.tokens import Prefix, PrefixKind, Tokens
from dualtrace.views import scaled

CREATED = datetime(2025, 3, 1, 12, 30, 5, 250_000, tzinfo=UTC)
PROVENANCE = ModelProvenance(
    model_id="m", revision="", family="llama", weights_digest="sha256:1", tokenizer_digest="sha256:2",
    framework="reference", framework_version="1", dtype="float64", matmul_precision="float64", device="cpu",
    attention_implementation="dense", adapter_digests=(("a", "sha256:3"),),
)  # fmt: skip
TEXT = Input(text="a 🙂\ud83d")  # with a lone surrogate, which a stored question may hold
QUESTION = RollingQuestion((TEXT,), Prefix(PrefixKind.BOS), top_k=2)


def tokens(ids: list[int], pieces: list[bytes] | None = None, start: int = 0) -> Tokens:
    count = len(ids)
    starts = np.arange(start, start + count, dtype=np.int32)
    made = tuple(pieces) if pieces is not None else tuple(b"t%d" % one for one in ids)
    return Tokens(np.array(ids, np.int32), made, starts, starts + np.int32(1))


def header(**changed: Any) -> AnswerHeader:
    item = ItemHeader(token_count=3, prompt_tokens=1, scored_start=1, unscored=tokens([7]))
    fields: dict[str, Any] = {
        "provenance": PROVENANCE, "items": (item,), "variants": 1, "top_k": 2, "streams": True, "has_pieces": True,
        "has_offsets": True,
    }  # fmt: skip
    return AnswerHeader(**{**fields, **changed})


def chunk(first: int = 1, logprobs: tuple[float, ...] = (-0.5, -2.0), item: int = 0) -> TokenChunk:
    count = len(logprobs)
    return TokenChunk(
        item, 0, first,
        tokens(list(range(8, 8 + count)), [b"\xf0\x9f", b"ok", *[b""] * count][:count], start=first),
        np.array(logprobs), np.array([1, 4, *[2] * count][:count], np.int32), np.zeros(count, np.int32),
        np.array([[8, 5]] * count, np.int32), np.array([[-0.5, -1.5]] * count),
    )  # fmt: skip


DONE = ItemDone(0, 0, 2, -2.5, -1.25, 3.49, False)
SUMMARY = AnswerSummary(Usage(3, 3), Execution(0.1, 0.2, 0.3, 0.6, 1, 3), 1, 0)


def collected(*events: Any, question: AskedQuestion = QUESTION, target: str = "fake:") -> Run:
    collector = RunCollector(target, question, created=CREATED)
    for event in events:
        collector.push(event)
    return collector.run()


def whole_run() -> Run:
    return collected(header(), chunk(), DONE, SUMMARY)


def document(**changed: Any) -> dict[str, Any]:
    return {**write_run(whole_run()), **changed}


def refusal(given: dict[str, Any] | str) -> Problem:
    with pytest.raises(InvalidArgument) as caught:
        read_run(given if isinstance(given, str) else json.dumps(given))
    return caught.value


def entry_refusal(**changed: Any) -> Problem:
    items = [{**document()["items"][0], **changed}]
    return refusal(document(items=items))


async def ask_fake(question: AskedQuestion, spec: str = "") -> Run:
    scorer = EngineScorer(FakeEngine(parse_spec(spec)), fake_tokenizer())
    try:
        collector = RunCollector("fake:", question, created=CREATED, provenance=(await scorer.describe()).provenance)
        async for event in scorer.ask(question):
            collector.push(event)
        return collector.run()
    finally:
        await scorer.close()


def test_a_document_names_its_kind_version_time_and_target() -> None:
    found = document()
    assert (found["kind"], found["score_debug_schema_version"]) == ("dualtrace.run", "1.0")
    assert (found["created"], found["target"]) == ("2025-03-01T12:30:05.250000Z", "fake:")


def test_an_unscored_token_has_null_where_numbers_would_stand() -> None:
    item = document()["items"][0]
    assert item["token_ids"] == [7, 8, 9]
    assert item["token_logprobs"] == [None, -0.5, -2.0]
    assert item["token_nll"] == [None, 0.5, 2.0]
    assert item["token_ranks"] == [None, 1, 4]


def test_a_piece_that_is_no_text_is_written_in_hex() -> None:
    assert document()["items"][0]["tokens"] == ["t7", {"hex": "f09f"}, "ok"]


def test_candidates_are_keyed_by_position_and_id() -> None:
    assert document()["items"][0]["token_candidates"]["1"] == {"8": -0.5, "5": -1.5}


def test_without_top_k_there_are_no_candidates() -> None:
    assert collected(header(top_k=0), chunk(), DONE, SUMMARY).entries[0].token_candidates is None  # type: ignore[union-attr]


def test_mrr_and_rank1_share_are_means_over_the_scored_tokens() -> None:
    item = document()["items"][0]
    assert (item["mrr"], item["rank1_share"]) == (0.625, 0.5)


def test_a_scorer_without_a_tokenizer_has_no_pieces_and_no_offsets() -> None:
    item = collected(header(has_pieces=False, has_offsets=False), chunk(), DONE, SUMMARY).entries[0]
    assert isinstance(item, ScoredItem)
    assert (item.tokens, item.char_starts, item.char_ends) == (None, None, None)


def test_a_failed_item_says_why_and_has_no_total() -> None:
    problem = InvalidArgument(Reason.EMPTY_COMPLETION, "nothing to score", field="items[0]", item=0)
    item = write_run(collected(header(), ItemProblem(0, 0, problem), SUMMARY))["items"][0]
    assert item["problem"]["reason"] == "EMPTY_COMPLETION"
    assert (item["total_logprob"], item["mrr"]) == (None, None)


def test_an_answer_that_broke_off_is_not_complete() -> None:
    run = collected(header(), chunk())
    assert run.complete is False
    assert read_run(run_to_text(run)).complete is False


def test_nothing_at_all_is_no_run() -> None:
    with pytest.raises(Internal, match="broke off"):
        collected()


def test_identity_is_the_same_for_another_execution() -> None:
    other = dataclasses.replace(whole_run(), execution=Execution(queue_seconds=9), created="later", target="grpc://x")
    assert other.identity == whole_run().identity


def test_identity_differs_for_another_question() -> None:
    assert dataclasses.replace(whole_run(), question=RollingQuestion((TEXT,))).identity != whole_run().identity


def test_identity_differs_for_another_model() -> None:
    provenance = dataclasses.replace(PROVENANCE, weights_digest="sha256:other")
    assert dataclasses.replace(whole_run(), provenance=provenance).identity != whole_run().identity


def test_a_run_is_one_line_of_ascii() -> None:
    text = run_to_text(dataclasses.replace(whole_run(), target="fake:\x1b[31m\x9b\u202e🙂"))
    assert text.isascii()
    assert text.isprintable()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_never_written(value: float) -> None:
    entry = dataclasses.replace(whole_run().entries[0], token_logprobs=(None, -0.5, value))  # type: ignore[arg-type]
    with pytest.raises(BadNumbers, match="token_logprobs"):
        write_run(dataclasses.replace(whole_run(), entries=(entry,)))


QUESTIONS = (
    LogprobQuestion((LogprobItem(Input(text="a b"), Input(text=" c 🙂")), LogprobItem(TEXT, Input(text="")))),
    LogprobQuestion((LogprobItem(Input(ids=np.array([], np.int32)), Input(ids=np.array([5, 6], np.int32))),)),
    RollingQuestion((Input(text="one two"), Input(text="")), Prefix(token_id=3), 4, 2, top_k=3),
    NextTokenQuestion((Input(text="one"), Input(text="")), top_k=3, extra_token_ids=(9, 5)),
    ScoreQuestion(Input(text="q"), (Input(text="a"), Input(text="b")), labels=(5, 6), apply_softmax=True),
    ScoreQuestion(Input(text=""), (Input(text="a"), Input(text="")), item_labels=((1,), (2, 3))),
    TokenizeQuestion((Input(text="🙂"), Input(ids=np.array([175], np.int32)), TEXT)),
)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.kind.value)
def test_reading_and_writing_again_changes_nothing(question: AskedQuestion) -> None:
    text = run_to_text(asyncio.run(ask_fake(question)))
    assert run_to_text(read_run(text)) == text


def test_masks_views_and_spans_of_a_question_survive_reading_and_writing() -> None:
    edge = Edge(Named(SegmentName.COMPLETION), TokenRange(0, 2))
    variants = (Variant(), Variant(scaled("a", 0.5), MaskSpec(Sliding(4, 0), (edge,)), allow_leak=True))
    reads = (TokenRange(0, 1), CharRange(0, 2, Alignment.OVERLAP), Named(SegmentName.PROMPT))
    question = MaskedForwardQuestion(TEXT, variants, ((SegmentName.PROMPT, (0, 2)),), reads, kl_base_masked=True)
    text = run_to_text(dataclasses.replace(whole_run(), question=question))
    again = read_run(text)
    assert run_to_text(again) == text
    assert isinstance(again.question, MaskedForwardQuestion)
    assert (again.question.variants, again.question.reads) == (variants, reads)


def test_a_receipt_survives_reading_and_writing() -> None:
    receipt = MaskReceipt("sha256:4", (0, 2), ((1,), (0, 3)), (0, 1, 2), ((0, 1), (1,), (3,)), 9, 8, 0)
    applied = Applied(MaskMetadata("sliding", "sha256:5", "rules", 0.25, ("a note",)), receipt)
    done = dataclasses.replace(DONE, applied=applied, document_starts=(2,), delta_modules=("q_proj",))
    text = run_to_text(collected(header(), chunk(), done, SUMMARY))
    again = read_run(text).entries[0]
    assert isinstance(again, ScoredItem)
    assert (again.applied, again.document_starts, again.delta_modules) == (applied, (2,), ("q_proj",))


def test_a_mask_that_is_none_is_refused_by_its_path() -> None:
    found = document()
    found["question"]["variants"][0]["mask"] = {"base": {"diagonal": {}}}
    assert refusal(found).detail.field.startswith("question.variants[0].mask")


FINITE = st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text(max_size=8)


@st.composite
def scored_items(draw: st.DrawFn) -> ScoredItem:
    count = draw(st.integers(0, 5))

    def columns(values: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.lists(values, min_size=count, max_size=count)))

    logprobs = columns(st.none() | FINITE)
    number, flag = st.none() | FINITE, st.none() | st.booleans()
    candidates = st.dictionaries(st.integers(0, 9), st.dictionaries(st.integers(0, 9), FINITE))
    problem = st.builds(InvalidArgument, st.sampled_from(Reason), WORDS, field=WORDS, allowed=WORDS)
    return ScoredItem(
        item=draw(st.integers(0, 9)), variant=0, prefix_token_id=draw(st.none() | st.integers(0, 99)), prompt_tokens=0,
        scored_start=None, boundary_token_merged=draw(st.booleans()), windows=None,
        tokens=draw(st.none() | st.just(columns(st.none() | st.binary(max_size=4)))),
        token_ids=columns(st.none() | st.integers(0, 2**31 - 1)), char_starts=None, char_ends=None,
        token_logprobs=logprobs, token_nll=tuple(None if one is None else 0.0 - one for one in logprobs),
        token_ranks=columns(st.none() | st.integers(1, 99)), token_ties=columns(st.none() | st.integers(0, 9)),
        token_kl_base_masked=None, token_kl_masked_base=None, token_candidates=draw(st.none() | candidates),
        total_logprob=draw(number), mean_logprob=draw(number), perplexity=draw(number), is_greedy=draw(flag),
        mrr=None, rank1_share=None, applied=None, document_starts=(), delta_modules=(),
        problem=draw(st.none() | st.builds(store_problem, problem)),
    )  # fmt: skip


@given(items=st.lists(scored_items(), max_size=3), target=WORDS, complete=st.booleans())
@settings(max_examples=60)
def test_any_run_survives_reading_and_writing(items: list[ScoredItem], target: str, complete: bool) -> None:
    text = run_to_text(dataclasses.replace(whole_run(), entries=tuple(items), target=target, complete=complete))
    assert run_to_text(read_run(text)) == text


PLAIN = st.none() | st.booleans() | FINITE | WORDS | st.integers()
NAMES = st.sampled_from(sorted(write_run(whole_run()))) | WORDS


@given(st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=6)))
@settings(max_examples=150)
def test_any_other_json_is_refused_and_never_crashes(value: Any) -> None:
    assert refusal(json.dumps(value))


@given(st.data())
@settings(max_examples=150)
def test_one_field_replaced_by_anything_is_read_or_refused_and_never_crashes(data: st.DataObject) -> None:
    whole: Any = document()
    holder: Any = whole
    place = data.draw(st.sampled_from(sorted(whole)))
    for _ in range(data.draw(st.integers(0, 3))):
        below = holder[place]
        if not isinstance(below, dict | list) or not below:
            break
        places = sorted(below) if isinstance(below, dict) else range(len(below))
        holder, place = below, data.draw(st.sampled_from(places))
    holder[place] = data.draw(st.none() | st.booleans() | FINITE | WORDS | st.integers() | st.just([]) | st.just({}))
    with contextlib.suppress(Problem):  # read, or refused as a Problem: any other exception fails the test
        read_run(json.dumps(whole))


@pytest.mark.parametrize("version", ["2.0", "0.9"])
def test_an_unknown_major_version_is_refused_with_both_versions(version: str) -> None:
    problem = refusal(document(score_debug_schema_version=version))
    assert problem.reason is Reason.SCHEMA_VERSION
    assert version in problem.detail.message
    assert problem.detail.allowed == "1.x"


@pytest.mark.parametrize("version", [None, 1.0, "1", "1.0.0", "one", ""])
def test_a_version_that_is_none_is_malformed(version: object) -> None:
    assert refusal(document(score_debug_schema_version=version)).reason is Reason.MALFORMED


def test_a_later_minor_version_may_hold_fields_we_do_not_know() -> None:
    found = document(score_debug_schema_version="1.7", mood="sunny")
    found["items"][0]["colour"] = "red"
    found["execution"]["hops"] = 3
    assert read_run(json.dumps(found)).entries[0].item == 0


def test_an_unknown_field_of_our_own_version_is_refused_by_its_path() -> None:
    problem = entry_refusal(colour="red")
    assert (problem.reason, problem.detail.field) == (Reason.UNKNOWN_FIELD, "items[0].colour")


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_not_read(token: str) -> None:
    text = json.dumps(document()).replace("-0.5", token, 1)
    assert refusal(text).reason is Reason.NOT_FINITE


def test_a_missing_field_is_named() -> None:
    found = document()
    del found["items"][0]["token_ranks"]
    problem = refusal(found)
    assert (problem.reason, problem.detail.field) == (Reason.MISSING, "items[0].token_ranks")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("item", "0"), ("item", True), ("item", 0.0), ("token_ids", {}), ("token_ids", [7, 8, "9"]),
        ("is_greedy", 1), ("tokens", ["a", "b", {"hex": "zz"}]), ("tokens", ["a", "b", {"hex": "6869"}]),
        ("token_candidates", {"x": {}}), ("boundary_token_merged", None), ("problem", "bad"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_malformed(field: str, value: object) -> None:
    problem = entry_refusal(**{field: value})
    assert problem.reason is Reason.MALFORMED
    assert problem.detail.field.startswith(f"items[0].{field}")


def test_a_number_beyond_64_bits_is_refused() -> None:
    assert entry_refusal(prompt_tokens=2**63).reason is Reason.OUT_OF_RANGE


@pytest.mark.parametrize("field", ["token_ranks", "tokens", "char_starts", "token_logprobs"])
def test_lists_of_unequal_length_are_refused(field: str) -> None:
    assert entry_refusal(**{field: [None, None]}).reason is Reason.CONFLICT


def test_a_nll_that_is_not_minus_its_logprob_is_refused() -> None:
    problem = entry_refusal(token_nll=[None, 0.5, 2.1])
    assert (problem.reason, problem.detail.field) == (Reason.CONFLICT, "items[0].token_nll[2]")


def test_a_changed_question_is_noticed_by_the_identity() -> None:
    found = document()
    found["question"]["top_k"] = 3
    assert refusal(found).reason is Reason.ARTIFACT_CORRUPT


def test_a_changed_provenance_is_noticed_by_its_digest() -> None:
    found = document()
    found["provenance"]["dtype"] = "float16"
    assert (refusal(found).reason, refusal(found).detail.field) == (Reason.ARTIFACT_CORRUPT, "provenance.digest")


def test_an_input_that_is_text_and_ids_is_refused() -> None:
    found = document()
    found["question"]["inputs"][0]["ids"] = [1]
    assert refusal(found).detail.field == "question.inputs[0]"


def test_a_question_of_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    problem = refusal(document(question={"kind": "GUESS"}))
    assert (problem.reason, "LOGPROB" in problem.detail.allowed) == (Reason.UNKNOWN_ENUM_VALUE, True)


def test_a_key_that_stands_twice_is_refused() -> None:
    assert refusal('{"kind": 1, "kind": 2}').reason is Reason.DUPLICATE


def test_endless_nesting_is_refused() -> None:
    assert refusal("[" * 100_000).reason is Reason.NESTED_TOO_DEEP


def test_a_number_of_very_many_digits_is_refused() -> None:
    assert refusal("1" * 10_000).reason is Reason.MALFORMED


def test_a_giant_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualtrace.records.MAX_CHARS", 100)
    problem = refusal(json.dumps(document()))
    assert (problem.reason, problem.detail.allowed) == (Reason.TOO_MANY, "0-100")


@pytest.mark.parametrize("text", ["", "{", "[1,]", "nothing", "\ud800"])
def test_what_is_no_json_is_malformed(text: str) -> None:
    assert refusal(text).reason is Reason.MALFORMED


def test_a_problem_comes_back_as_the_same_exception() -> None:
    problem = BadNumbers(Reason.NON_FINITE_LOGITS, "NaN", field="f", allowed="a", item=2)
    again = restore_problem(store_problem(problem), 2)
    assert (type(again), again.detail) == (BadNumbers, problem.detail)


def test_a_problem_of_a_later_version_keeps_its_words() -> None:
    stored = dataclasses.replace(store_problem(Internal(Reason.BUG, "words")), code="NEW_CODE", reason="NEW_REASON")
    assert restore_problem(stored).detail.message == "words"


def test_a_chunk_that_does_not_follow_is_refused() -> None:
    with pytest.raises(Internal, match="do not follow"):
        collected(header(), chunk(first=0))


def test_a_chunk_beyond_the_announced_tokens_is_refused() -> None:
    with pytest.raises(Internal, match="do not follow"):
        collected(header(), chunk(logprobs=(-1.0,) * 3))


def test_a_chunk_of_an_item_that_was_not_announced_is_refused() -> None:
    with pytest.raises(Internal, match="item 1"):
        collected(header(), chunk(item=1))


def test_a_header_of_other_variants_than_asked_is_refused() -> None:
    with pytest.raises(Internal, match="variants"):
        collected(header(variants=2))


def test_announced_tokens_take_no_room_before_they_come() -> None:
    giant = ItemHeader(token_count=2**31 - 1, scored_start=0)
    assert collected(header(items=(giant,))).entries[0].token_ids == ()  # type: ignore[union-attr]


def test_extra_logprobs_must_be_as_many_as_were_asked() -> None:
    found = NextTokens(
        np.array([1], np.int32), np.array([-1.0]), (), Tail("MEASURED", -0.5), np.array([-2.0]), None, 9, 1, None
    )
    answer = NextTokenAnswer((NextTokenResult(0, 0, found),), PROVENANCE, Usage(1, 1), Execution())
    with pytest.raises(Internal, match="extra"):
        collected(answer, question=NextTokenQuestion((TEXT,), 1, (5, 6)))
