"""Masks, packed scoring, explanations and artifacts over a real socket, answered by the reference engine."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

from dualtrace.artifacts import digest_of
from dualtrace.client import Client
from dualtrace.engine import Batch, EngineSettings, Live, Reads, Step, int_array
from dualtrace.engine_scorer import EngineScorer
from dualtrace.masks import spec as s
from dualtrace.masks.arrays import BoolArray, npy_bytes
from dualtrace.masks.packing import Convention
from dualtrace.masks.plan import compile_mask
from dualtrace.masks.resolve import resolve
from dualtrace.problems import InvalidArgument, NotFound, Reason, Unsupported
from dualtrace.questions.answers import ItemDone, ItemProblem, NextTokens, TokenChunk
from dualtrace.questions.asked import (
    ArtifactQuestion,
    ExplainMaskQuestion,
    Input,
    LogprobItem,
    LogprobQuestion,
    MaskedForwardQuestion,
    MaskForm,
    MaskWhy,
    NextTokenQuestion,
    RollingQuestion,
    ScoreQuestion,
    Variant,
)
from dualtrace.reference import load
from dualtrace.scorer import ask_one
from dualtrace.tokens import Tokenizer
from dualtrace.views import finetuned
from tests.support.adapters import tiny_adapter
from tests.support.scorers import all_events, connected, fake_scorer, only
from tests.support.tiny import tiny_model

TEXT = "The harbour was quiet, and the old men mended their nets in the sun."


def reference_scorer(**fields: Any) -> EngineScorer:
    folder = tiny_model(**fields)
    return EngineScorer(load(EngineSettings(model=folder)), Tokenizer.from_directory(folder))


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with connected(reference_scorer()) as made:
        yield made


def edge(queries: tuple[int, int], keys: tuple[int, int], **fields: Any) -> s.MaskSpec:
    return s.MaskSpec(edges=(s.Edge(s.TokenRange(*queries), s.TokenRange(*keys), **fields),))


def masked(*masks: s.MaskSpec | None, **fields: Any) -> MaskedForwardQuestion:
    variants = tuple(Variant(mask=mask) for mask in masks)
    return MaskedForwardQuestion(Input(text=TEXT), variants, **fields)


def columns(events: list[Any], variant: int, name: str) -> dict[int, float]:
    """Token index to value, over all chunks of one variant."""
    found: dict[int, float] = {}
    for chunk in only(events, TokenChunk):
        if chunk.variant == variant:
            values = getattr(chunk, name)
            found |= {chunk.first_index + i: float(value) for i, value in enumerate(values)}
    return found


async def test_an_empty_edge_set_is_the_model_itself(client: Client) -> None:
    plain = await all_events(client, RollingQuestion((Input(text=TEXT),)))
    events = await all_events(client, masked(s.MaskSpec(), None))
    expected = columns(plain, 0, "logprobs")
    for variant in (0, 1):
        found = columns(events, variant, "logprobs")
        assert found.keys() == expected.keys()
        assert max(abs(found[i] - expected[i]) for i in expected) < 1e-12


async def test_a_cut_changes_only_what_comes_after_it_and_kl_says_so(client: Client) -> None:
    events = await all_events(client, masked(edge((8, 12), (1, 3)), kl_base_masked=True, kl_masked_base=True))
    for name in ("kl_base_masked", "kl_masked_base"):
        divergence = columns(events, 0, name)
        # Row 8 is the first that is cut; it predicts token 9. A prefix token in front does not shift tokens.
        assert all(abs(divergence[i]) < 1e-12 for i in divergence if i <= 8)
        assert divergence[9] > 1e-9
        assert all(value > -1e-12 for value in divergence.values())


async def test_the_receipt_comes_with_the_item_and_names_what_was_hit(client: Client) -> None:
    events = await all_events(client, masked(edge((8, 12), (1, 3), layers=(1,), heads=(0, 2))))
    applied = only(events, ItemDone)[0].applied
    assert applied is not None
    assert applied.receipt.layers_hit == (1,)
    assert applied.receipt.heads_hit == ((0, 2),)
    assert applied.receipt.entries_cut == 4 * 2 * 2
    assert applied.metadata.digest.startswith("sha256:")


async def test_a_mask_that_lets_rows_see_what_they_predict_is_refused_for_its_variant_alone(client: Client) -> None:
    events = await all_events(client, masked(s.MaskSpec(base=s.Full()), s.MaskSpec()))
    problem = only(events, ItemProblem)
    assert [(event.variant, event.problem.reason) for event in problem] == [(0, Reason.LEAK)]
    assert problem[0].problem.detail.field == "variants[0].allow_leak"
    assert [event.variant for event in only(events, ItemDone)] == [1]


async def test_a_leak_that_is_allowed_is_answered(client: Client) -> None:
    question = MaskedForwardQuestion(Input(text=TEXT), (Variant(mask=s.MaskSpec(base=s.Full()), allow_leak=True),))
    assert only(await all_events(client, question), ItemDone)[0].scored_tokens > 10


async def test_isolated_documents_leave_their_first_token_unscored(client: Client) -> None:
    mask = s.MaskSpec(base=s.DocIsolation(boundaries=(5, 9), reset_positions=True))
    events = await all_events(client, masked(mask))
    done = only(events, ItemDone)[0]
    assert done.document_starts == (5, 9)
    scored = columns(events, 0, "logprobs")
    assert 5 not in scored
    assert 9 not in scored
    assert done.scored_tokens == len(scored)


async def test_spans_to_read_limit_what_is_answered(client: Client) -> None:
    events = await all_events(client, masked(s.MaskSpec(), reads=(s.TokenRange(4, 6), s.TokenRange(9, 10))))
    assert sorted(columns(events, 0, "logprobs")) == [4, 5, 9]


async def test_logprob_takes_masks_that_name_prompt_and_completion(client: Client) -> None:
    mask = s.MaskSpec(
        edges=(s.Edge(s.Named(s.SegmentName.COMPLETION), s.Named(s.SegmentName.PROMPT)),),
    )
    item = LogprobItem(Input(text="one two three"), Input(text=" four five"))
    events = await all_events(client, LogprobQuestion((item,), variants=(Variant(), Variant(mask=mask))))
    plain, cut = (columns(events, variant, "logprobs") for variant in (0, 1))
    first = min(plain)
    assert plain[first] == pytest.approx(cut[first], abs=1e-12)  # predicted from the prompt's last row, which sees all
    assert abs(plain[first + 1] - cut[first + 1]) > 1e-9


async def test_a_masked_rolling_text_must_fit_one_window(client: Client) -> None:
    variants = (Variant(), Variant(mask=s.MaskSpec()))
    events = await all_events(client, RollingQuestion((Input(text=TEXT),), max_tokens=8, variants=variants))
    problems = only(events, ItemProblem)
    assert [(event.variant, event.problem.reason) for event in problems] == [(1, Reason.MASK_NEEDS_ONE_WINDOW)]
    assert [event.variant for event in only(events, ItemDone)] == [0]


async def test_next_token_and_score_answer_under_masks_with_receipts(client: Client) -> None:
    mask = s.MaskSpec(base=s.Sliding(3, 0))
    following = await client.next_token(
        NextTokenQuestion((Input(text=TEXT),), top_k=2, variants=(Variant(), Variant(mask=mask)))
    )
    plain, cut = (result.outcome for result in following.results)
    assert isinstance(plain, NextTokens)
    assert isinstance(cut, NextTokens)
    assert plain.applied is None
    assert cut.applied is not None
    assert plain.top_logprobs[0] != cut.top_logprobs[0]
    scored = await client.score(
        ScoreQuestion(Input(text="The "), (Input(text="sea"),), labels=(5, 6), variants=(Variant(mask=mask),))
    )
    assert scored.results[0].applied is not None


def packable() -> ScoreQuestion:
    ids = [np.arange(start, start + length, dtype=np.int32) for start, length in ((3, 2), (9, 0), (7, 3))]
    return ScoreQuestion(Input(ids=int_array(range(5, 25))), tuple(Input(ids=item) for item in ids), labels=(1, 2, 3))


async def test_hidden_packing_scores_ids_exactly_as_separately(client: Client) -> None:
    separate = await client.score(packable())
    packed = await client.score(dataclasses.replace(packable(), packing=Convention.MIS_HIDDEN_DELIMITER))
    for left, right in zip(separate.results, packed.results, strict=True):
        assert left.label_logprobs == pytest.approx(right.label_logprobs, abs=1e-12)
        assert left.prompt_tokens == right.prompt_tokens
    assert packed.usage.prompt_tokens == 20 + 1 + 2 + 1 + 0 + 1 + 3 + 1
    assert packed.usage.computed_tokens < separate.usage.computed_tokens


async def test_visible_packing_scores_as_query_delimiter_item(client: Client) -> None:
    question = packable()
    packed = await client.score(
        dataclasses.replace(question, packing=Convention.MIS_VISIBLE_DELIMITER, delimiter_token_id=11)
    )
    assert question.query.ids is not None
    with_delimiter = Input(ids=np.append(question.query.ids, np.int32(11)))
    separate = await client.score(dataclasses.replace(question, query=with_delimiter))
    for left, right in zip(separate.results, packed.results, strict=True):
        assert left.label_logprobs == pytest.approx(right.label_logprobs, abs=1e-12)


async def test_packed_items_may_have_labels_of_their_own(client: Client) -> None:
    labels = ((1, 2), (300, 4), (2, 1))
    question = dataclasses.replace(packable(), labels=None, item_labels=labels)
    separate = await client.score(question)
    packed = await client.score(dataclasses.replace(question, packing=Convention.MIS_HIDDEN_DELIMITER))
    for left, right in zip(separate.results, packed.results, strict=True):
        assert left.label_logprobs == pytest.approx(right.label_logprobs, abs=1e-12)


async def test_hidden_packing_without_a_query_scores_separately(client: Client) -> None:
    items = (Input(ids=int_array([3, 4])), Input(ids=int_array([])))
    question = ScoreQuestion(Input(ids=int_array([])), items, labels=(1,), packing=Convention.MIS_HIDDEN_DELIMITER)
    answer = await client.score(question)
    assert len(answer.results[0].scores) == 1
    assert answer.results[1].problem is not None
    assert answer.results[1].problem.reason is Reason.EMPTY_PROMPT


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ({"item_first": True}, Reason.CONFLICT, "item_first"),
        ({"packing": Convention.MIS_VISIBLE_DELIMITER}, Reason.MISSING, "delimiter_token_id"),
        ({"delimiter_token_id": 99_999}, Reason.TOKEN_OUT_OF_RANGE, "delimiter_token_id"),
        ({"packing": None, "delimiter_token_id": 3}, Reason.CONFLICT, "delimiter_token_id"),
        ({"variants": (Variant(mask=s.MaskSpec()),)}, Reason.CONFLICT, "variants"),
    ],
)
async def test_what_packing_excludes_is_refused_by_name(
    client: Client, change: dict[str, Any], reason: Reason, field: str
) -> None:
    question = dataclasses.replace(packable(), **({"packing": Convention.MIS_HIDDEN_DELIMITER} | change))
    with pytest.raises(InvalidArgument) as caught:
        await client.score(question)
    assert caught.value.reason is reason
    assert caught.value.detail.field == field


async def test_an_array_sent_ahead_is_named_by_its_digest(client: Client) -> None:
    events = await all_events(client, masked(s.MaskSpec()))
    length = max(columns(events, 0, "logprobs")) + 2  # one prefix token in front
    causal = np.tril(np.ones((length, length), np.bool_))
    digest = await client.put_artifact(npy_bytes(causal))
    by_digest = s.MaskSpec(base=s.Array(artifact_digest=digest))
    inline = s.MaskSpec(base=s.Array(content=BoolArray(causal)))
    answers = await all_events(client, masked(by_digest, inline))
    assert not only(answers, ItemProblem)
    expected = columns(events, 0, "logprobs")
    for variant in (0, 1):
        assert columns(answers, variant, "logprobs") == pytest.approx(expected, abs=1e-12)


async def test_an_artifact_that_was_never_sent_is_not_found(client: Client) -> None:
    unknown = s.MaskSpec(base=s.Array(artifact_digest=digest_of(b"nothing")))
    events = await all_events(client, masked(unknown))
    assert [event.problem.reason for event in only(events, ItemProblem)] == [Reason.NOT_FOUND]


async def test_an_artifact_with_another_digest_or_no_array_is_refused(client: Client) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await ask_one(client, ArtifactQuestion(b"abc", digest_of(b"abd")))
    assert caught.value.reason is Reason.ARTIFACT_CORRUPT
    with pytest.raises(InvalidArgument) as caught:
        await client.put_artifact(b"not an array")
    assert caught.value.reason is Reason.MALFORMED


async def test_a_mask_is_explained_without_a_forward(client: Client) -> None:
    question = ExplainMaskQuestion(
        Input(text="Hello world"),
        s.MaskSpec(base=s.Sliding(2, 0)),
        layer=0,
        head=1,
        forms=(MaskForm.RUNS, MaskForm.NPY, MaskForm.PNG),
        why=(MaskWhy(0, 0, 3, 1), MaskWhy(0, 0, 3, 2)),
    )
    explained = await client.explain_mask(question)
    assert explained.rows is not None
    assert explained.rows[3] == ((2, 4),)
    assert explained.npy is not None
    assert explained.npy.startswith(b"\x93NUMPY")
    assert explained.png is not None
    assert explained.png.startswith(b"\x89PNG")
    assert [answer.may_see for answer in explained.answers] == [False, True]
    assert "sliding" in explained.answers[0].rule


async def test_explaining_refuses_a_layer_that_does_not_exist(client: Client) -> None:
    question = ExplainMaskQuestion(Input(text="a b"), s.MaskSpec(), layer=40, head=0)
    with pytest.raises(InvalidArgument, match="layer 40 asked; the model has 3") as caught:
        await client.explain_mask(question)
    assert caught.value.detail.allowed == "0-2"


async def test_a_syntax_error_in_a_mask_names_its_place(client: Client) -> None:
    mask = edge((8, 12), (1, 3), heads=(40,))
    events = await all_events(client, masked(mask))
    problem = only(events, ItemProblem)[0].problem
    assert problem.detail.field.startswith("variants[0].mask.edges[0].heads")


async def test_an_adapter_nobody_has_is_refused_by_name() -> None:
    question = RollingQuestion((Input(text="a b c"),), variants=(Variant(finetuned("mine")),))
    async with connected(reference_scorer()) as client:
        with pytest.raises(NotFound, match="mine"):
            await all_events(client, question)
    async with connected(fake_scorer()) as client:
        with pytest.raises(Unsupported) as caught:
            await all_events(client, question)
    assert caught.value.reason is Reason.UNSUPPORTED_VIEW


async def test_an_engine_that_does_not_apply_the_mask_is_found_out() -> None:
    class Careless:
        """Runs every row without its mask, and reports the counts of the causal mask it really applied."""

        def __init__(self) -> None:
            self.inner = load(EngineSettings(model=tiny_model()))
            self.card = self.inner.card
            self.prepare, self.close = self.inner.prepare, self.inner.close

        def forward(self, batch: Batch, reads: Reads, live: Live) -> Iterator[Step]:
            def forget(segment: Any) -> Any:
                if segment.mask is None:
                    return segment
                plan = compile_mask(resolve(s.MaskSpec(), segment.mask.resolved.context))
                return dataclasses.replace(segment, mask=plan)

            careless = dataclasses.replace(batch, segments=tuple(forget(segment) for segment in batch.segments))
            return self.inner.forward(careless, reads, live)

    scorer = EngineScorer(Careless(), Tokenizer.from_directory(tiny_model()))
    async with connected(scorer) as client:
        events = await all_events(client, masked(edge((8, 12), (1, 3)), s.MaskSpec()))
    assert [(e.variant, e.problem.reason) for e in only(events, ItemProblem)] == [(0, Reason.MASK_NOT_APPLIED)]
    assert [event.variant for event in only(events, ItemDone)] == [1]


async def test_a_refused_variant_of_a_rolling_text_is_named_by_its_own_number(client: Client) -> None:
    variants = (Variant(), Variant(mask=s.MaskSpec(base=s.Full())))
    events = await all_events(client, RollingQuestion((Input(text=TEXT),), variants=variants))
    problems = only(events, ItemProblem)
    assert [(event.variant, event.problem.detail.field) for event in problems] == [(1, "variants[1].allow_leak")]


async def test_an_engine_without_masks_explains_none() -> None:
    async with connected(fake_scorer()) as client:
        with pytest.raises(Unsupported) as caught:
            await client.explain_mask(ExplainMaskQuestion(Input(text="a b"), s.MaskSpec()))
    assert caught.value.reason is Reason.UNSUPPORTED_MASK


async def test_next_and_score_tell_which_modules_a_view_reached() -> None:
    folder = tiny_model()
    settings = EngineSettings(model=folder, adapters=(("mine", tiny_adapter(folder)),))
    scorer = EngineScorer(load(settings), Tokenizer.from_directory(folder))
    variants = (Variant(), Variant(finetuned("mine")))
    async with connected(scorer) as client:
        following = await client.next_token(NextTokenQuestion((Input(text=TEXT),), top_k=1, variants=variants))
        scored = await client.score(ScoreQuestion(Input(text="a "), (Input(text="b"),), labels=(5,), variants=variants))
    for answer in (following, scored):
        assert [view.variant for view in answer.views] == [1]
        assert all(name.startswith("model.layers.") for name in answer.views[0].delta_modules)
        assert answer.views[0].delta_modules
