"""The torch engine on the real model agrees with everybody else who can score it, on short texts and a long one."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dualtrace.arrays import FloatArray
from dualtrace.engine import Engine, EngineSettings, int_array
from dualtrace.masks.spec import Edge, MaskSpec, TokenRange
from dualtrace.models.fetch import fetch_smollm2
from dualtrace.questions.answers import ItemDone, ItemProblem, TokenChunk
from dualtrace.questions.asked import (
    Input,
    LogprobItem,
    LogprobQuestion,
    MaskedForwardQuestion,
    RollingQuestion,
    StreamQuestion,
    Variant,
)
from dualtrace.tokens import Prefix, PrefixKind, Tokenizer
from tests.support.contract import tolerance_of
from tests.support.engines import assert_near, lend
from tests.support.scorers import all_events
from tests.support.tolerances import LOG_SOFTMAX_LARGE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.torch,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the other tools, which are not ours to mend
]

PLACES = ("a harbour", "the old mill", "a valley in the north", "Kraków", "the third floor", "東京", "an island")
DEEDS = ("counted 17 boats", "lost a key", "wrote f(x) = x ** 2", "sang until noon", "met Zoë & Co.", "slept")
TEXTS = {
    "prose": "The capital of France is Paris, and the capital of Germany is Berlin. It's 1,234.56!  Two  spaces.",
    "code": "def f(x: int) -> int:\n\treturn x ** 2  # 42\n\n\nfor i in range(100):\n    print(f'{i:03d}')\r\n",
    "other scripts": "東京は日本の首都です。 naïve café 👍🏽 Straße 한국어 👩‍👩‍👧",
    "long": " ".join(
        f"On day {day}, near {PLACES[day % 7]}, she {DEEDS[day % 6]}, and nobody asked why." for day in range(40)
    ),
}
CHOICES = (
    ("The capital of France is", (" Paris", " Berlin", " a large city on the river Seine")),
    (TEXTS["long"] + " In the end,", (" she went home.", " the boats were gone, and the key was found again.")),
)


def needs(module: str, package: str) -> pytest.MarkDecorator:
    """The tools that only `make bench` installs."""
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None, reason=f"{package} is not installed; `make bench` installs it"
    )


@pytest.fixture(scope="module")
def folder() -> Path:
    return fetch_smollm2(None, lambda _message, _share: None)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    loaded: Engine = import_module("backend_torch").load(EngineSettings(model=folder))
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_directory(folder)


@pytest.fixture(scope="module")
def bare(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="float32")
    return model.requires_grad_(False).train(False)


@pytest.fixture(scope="module")
def harness(bare: Any, folder: Path) -> Any:
    from transformers import AutoTokenizer

    lm = import_module("lm_eval.models.huggingface")
    return lm.HFLM(pretrained=bare, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=2)


@pytest.fixture(scope="module")
def ids(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda name: tokenizer.encode(TEXTS[name], special_tokens=False).ids.tolist()


def ask(engine: Engine, tokenizer: Tokenizer, question: StreamQuestion) -> tuple[list[TokenChunk], list[ItemDone]]:
    """Token chunks and ends by item, then variant. A failed item fails the test."""
    from dualtrace.engine_scorer import EngineScorer

    async def run() -> list[Any]:
        scorer = EngineScorer(lend(engine), tokenizer)
        try:
            return await all_events(scorer, question)
        finally:
            await scorer.close()

    events = asyncio.run(run())
    assert [event.problem for event in events if isinstance(event, ItemProblem)] == []
    chunks = [event for event in events if isinstance(event, TokenChunk)]
    done = [event for event in events if isinstance(event, ItemDone)]
    return (
        sorted(chunks, key=lambda chunk: (chunk.item, chunk.variant, chunk.first_index)),
        sorted(done, key=lambda end: (end.item, end.variant)),
    )


def scored(engine: Engine, tokenizer: Tokenizer, text: list[int]) -> FloatArray:
    """[T-1] the logprob of every token but the first."""
    chunks, _done = ask(engine, tokenizer, RollingQuestion((Input(ids=int_array(text)),)))
    return np.concatenate([chunk.logprobs for chunk in chunks])


def target_logprobs(logits: Any, text: list[int]) -> FloatArray:
    """[T-1] from float32 logits [T, V], normalised in float64."""
    rows = logits[:-1].double()
    own: FloatArray = (rows.gather(1, rows.new_tensor(text[1:]).long()[:, None])[:, 0] - rows.logsumexp(1)).numpy()
    return own


def test_the_long_text_is_longer_than_512_tokens(ids: Callable[[str], list[int]]) -> None:
    assert len(ids("long")) > 512


@pytest.mark.parametrize("name", TEXTS)
def test_every_token_agrees_with_transformers_own_forward(
    name: str, engine: Engine, tokenizer: Tokenizer, bare: Any, ids: Callable[[str], list[int]]
) -> None:
    import torch

    text = ids(name)
    theirs = target_logprobs(bare(torch.tensor([text]), use_cache=False).logits[0], text)
    assert_near(scored(engine, tokenizer, text), theirs, tolerance_of(engine.card), range(len(text)))


@pytest.mark.parametrize("name", ["prose", "long"])
def test_every_token_agrees_with_the_float64_reference(
    name: str, engine: Engine, tokenizer: Tokenizer, folder: Path, ids: Callable[[str], list[int]]
) -> None:
    from dualtrace.reference import load

    text = ids(name)
    reference = load(EngineSettings(model=folder))
    theirs = scored(reference, tokenizer, text)
    reference.close()
    assert_near(scored(engine, tokenizer, text), theirs, tolerance_of(engine.card), range(len(text)))


@needs("ctranslate2", "ctranslate2")
@pytest.mark.parametrize("name", TEXTS)
def test_every_token_agrees_with_ctranslate2(
    name: str, engine: Engine, tokenizer: Tokenizer, converted: Any, ids: Callable[[str], list[int]]
) -> None:
    from tokenizers import Tokenizer as PlainTokenizer

    text = ids(name)
    words = PlainTokenizer.from_file(str(converted.folder / "tokenizer.json"))
    (result,) = converted.generator.score_batch([[words.id_to_token(number) for number in text]])
    theirs = np.array(result.log_probs, np.float64)
    assert_near(scored(engine, tokenizer, text), theirs, tolerance_of(engine.card), range(len(text)))


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = import_module("ctranslate2")
    target = tmp_path_factory.mktemp("ctranslate2") / "model"
    library.converters.TransformersConverter(str(folder)).convert(str(target))
    generator = library.Generator(str(target), "cpu", compute_type="float32", intra_threads=1)
    return SimpleNamespace(folder=folder, generator=generator)


@needs("lm_eval", "lm-eval")
@pytest.mark.parametrize(("prompt", "completions"), CHOICES, ids=["short prompt", "long prompt"])
def test_completions_agree_with_lm_eval_loglikelihood(
    prompt: str, completions: tuple[str, ...], engine: Engine, tokenizer: Tokenizer, harness: Any
) -> None:
    requests = [SimpleNamespace(args=(prompt, completion)) for completion in completions]
    theirs = harness.loglikelihood(requests, disable_tqdm=True)
    items = tuple(LogprobItem(Input(text=prompt), Input(text=completion)) for completion in completions)
    _chunks, done = ask(engine, tokenizer, LogprobQuestion(items))
    for ours, (total, greedy) in zip(done, theirs, strict=True):
        assert ours.total_logprob == pytest.approx(total, rel=0, abs=LOG_SOFTMAX_LARGE.epsilon(ours.scored_tokens))
        assert ours.is_greedy == greedy


@needs("lm_eval", "lm-eval")
@pytest.mark.parametrize("name", TEXTS)
def test_whole_texts_agree_with_lm_eval_loglikelihood_rolling(
    name: str, engine: Engine, tokenizer: Tokenizer, harness: Any
) -> None:
    (theirs,) = harness.loglikelihood_rolling([SimpleNamespace(args=(TEXTS[name],))], disable_tqdm=True)
    question = RollingQuestion((Input(text=TEXTS[name]),), prefix=Prefix(PrefixKind.BOS))
    _chunks, (done,) = ask(engine, tokenizer, question)
    assert done.total_logprob == pytest.approx(theirs, rel=0, abs=LOG_SOFTMAX_LARGE.epsilon(done.scored_tokens))


CUT_ROWS, CUT_KEYS = (500, 540), (60, 90)
CUT = MaskSpec(edges=(Edge(TokenRange(*CUT_ROWS), TokenRange(*CUT_KEYS)),))


def scored_under(engine: Engine, tokenizer: Tokenizer, text: list[int], mask: MaskSpec) -> FloatArray:
    """[T-1]"""
    question = MaskedForwardQuestion(Input(ids=int_array(text)), (Variant(mask=mask),))
    chunks, _done = ask(engine, tokenizer, question)
    return np.concatenate([chunk.logprobs for chunk in chunks])


def test_a_cut_in_the_long_text_agrees_with_transformers_under_the_same_mask(
    engine: Engine, tokenizer: Tokenizer, bare: Any, ids: Callable[[str], list[int]]
) -> None:
    import torch

    text = ids("long")
    mask = torch.full((len(text), len(text)), torch.finfo(torch.float32).min).triu(1)
    mask[slice(*CUT_ROWS), slice(*CUT_KEYS)] = torch.finfo(torch.float32).min
    logits = bare(torch.tensor([text]), attention_mask=mask[None, None], use_cache=False).logits[0]
    ours = scored_under(engine, tokenizer, text, CUT)
    assert_near(ours, target_logprobs(logits, text), tolerance_of(engine.card), range(len(text)))


def test_the_cut_moves_a_token_by_more_than_the_tolerance(
    engine: Engine, tokenizer: Tokenizer, ids: Callable[[str], list[int]]
) -> None:
    text = ids("long")
    pairs = zip(scored(engine, tokenizer, text), scored_under(engine, tokenizer, text, CUT), strict=True)
    assert not all(tolerance_of(engine.card).allows(float(uncut), float(cut)) for uncut, cut in pairs)
