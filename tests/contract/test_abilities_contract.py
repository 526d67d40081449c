"""What an engine says it can do it does, and what it cannot do is refused by name, never ignored."""

from __future__ import annotations

import pytest

from dualtrace.engine import int_array
from dualtrace.masks.packing import Convention
from dualtrace.masks.spec import MaskSpec, Sliding
from dualtrace.problems import NotFound, Reason, Unsupported
from dualtrace.questions.answers import ItemDone
from dualtrace.questions.asked import (
    ExplainMaskQuestion,
    Input,
    MaskedForwardQuestion,
    Question,
    RollingQuestion,
    ScoreQuestion,
    Variant,
)
from dualtrace.scorer import Scorer
from dualtrace.views import finetuned
from tests.support.contract import Subject
from tests.support.scorers import all_events, only

TEXT = Input(ids=int_array(range(5, 25)))
MASKED = (Variant(mask=MaskSpec(base=Sliding(4))),)
MASK_QUESTIONS: dict[str, Question] = {
    "rolling": RollingQuestion((TEXT,), variants=MASKED),
    "masked forward": MaskedForwardQuestion(TEXT, MASKED),
    "divergence": MaskedForwardQuestion(TEXT, MASKED, kl_base_masked=True),
    "packed": ScoreQuestion(TEXT, (TEXT,), labels=(1, 2), packing=Convention.MIS_HIDDEN_DELIMITER),
    "explanation": ExplainMaskQuestion(TEXT, MaskSpec()),
}


@pytest.mark.parametrize("name", MASK_QUESTIONS)
async def test_a_question_that_needs_masks_is_answered_or_refused_by_name(
    scorer: Scorer, subject: Subject, name: str
) -> None:
    if subject.engine.card.capabilities.masks:
        assert await all_events(scorer, MASK_QUESTIONS[name])
    else:
        with pytest.raises(Unsupported) as refused:
            await all_events(scorer, MASK_QUESTIONS[name])
        assert refused.value.reason is Reason.UNSUPPORTED_MASK


@pytest.mark.engines_but("fake")
async def test_a_mask_that_is_applied_has_a_receipt(scorer: Scorer) -> None:
    (done,) = only(await all_events(scorer, MASK_QUESTIONS["rolling"]), ItemDone)
    assert done.applied is not None


async def test_a_view_of_an_adapter_that_is_not_there_is_refused_by_name(scorer: Scorer, subject: Subject) -> None:
    question = RollingQuestion((TEXT,), variants=(Variant(finetuned("nobody")),))
    with pytest.raises(NotFound if subject.engine.card.capabilities.views else Unsupported) as refused:
        await all_events(scorer, question)
    wanted = Reason.NOT_FOUND if subject.engine.card.capabilities.views else Reason.UNSUPPORTED_VIEW
    assert refused.value.reason is wanted
