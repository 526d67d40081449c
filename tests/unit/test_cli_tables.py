"""Tables: numbers are whole at every width, hostile pieces cannot escape, colour is not needed."""

import dataclasses
import io
import re

import pytest
from rich.console import Console, RenderableType

from dualtrace.cli.output import show
from dualtrace.cli.tables import item_summary, model_line, surprise_style, token_table
from dualtrace.model_card import ModelProvenance
from dualtrace.runs.run import ScoredItem

LOGPROBS = (None, -0.1234, -11.9876, -123456.5, -2.0)
ITEM = ScoredItem(
    item=0, variant=0, prefix_token_id=None, prompt_tokens=0, scored_start=1, boundary_token_merged=False, windows=None,
    tokens=(b"The", b"\x1b]0;owned\x07", b"\xf0\x9f", b"[bold]:smile:", b" ordinarily-long-piece-of-text-without-end"),
    token_ids=(1, 2, 3, 151_642, 5), char_starts=None, char_ends=None, token_logprobs=LOGPROBS,
    token_nll=tuple(None if one is None else -one for one in LOGPROBS), token_ranks=(None, 1, 2, 151_643, 4),
    token_ties=(None, 0, 0, 0, 0), token_kl_base_masked=None, token_kl_masked_base=None, token_candidates=None,
    total_logprob=-123470.61, mean_logprob=-30867.6525, perplexity=None, is_greedy=False, mrr=0.4375, rank1_share=0.25,
    applied=None, document_starts=(), delta_modules=(), problem=None,
)  # fmt: skip
WITH_TOP = dataclasses.replace(ITEM, token_candidates={1: {2: -0.1234, 9: -2.5}, 2: {7: -0.5, 3: -11.9876}})


def render(renderable: RenderableType, width: int = 80, *, colour: bool = False) -> str:
    system = "truecolor" if colour else None
    console = Console(file=io.StringIO(), width=width, force_terminal=colour, color_system=system)  # type: ignore[arg-type]
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def at(width: int, *renderables: RenderableType) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        show(renderables)
        return capsys.readouterr().out

    return at


@pytest.mark.parametrize("width", [10, 30, 40, 60, 80, 120])
@pytest.mark.parametrize("item", [ITEM, WITH_TOP], ids=["plain", "top-k"])
def test_no_number_is_broken_or_cut_at_any_width(width: int, item: ScoredItem, shown) -> None:  # type: ignore[no-untyped-def]
    told = shown(width, token_table(item, 0, {}, width), item_summary(item))
    for number in ("-0.1234", "-11.9876", "-123456.5000", "151643", "151642", "-123470.6100", "0.4375"):
        assert number in told


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_table_fits_the_terminal_where_it_can(width: int, shown) -> None:  # type: ignore[no-untyped-def]
    told = shown(width, token_table(ITEM, 0, {}, width))
    assert max(len(line) for line in told.splitlines()) <= width


def test_nothing_in_a_piece_reaches_the_terminal_as_a_command() -> None:
    told = render(token_table(ITEM, 0, {}, 80))
    assert "\x1b" not in told
    assert "\x07" not in told


def test_a_piece_is_not_read_as_markup() -> None:
    assert "[bold]:smile:" in render(token_table(ITEM, 0, {}, 120), 120)


def test_without_colour_the_same_words_stand_there() -> None:
    plain = render(token_table(ITEM, 0, {}, 80))
    coloured = render(token_table(ITEM, 0, {}, 80), colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert coloured != plain


def test_ties_have_a_column_only_where_there_are_some() -> None:
    tied = dataclasses.replace(ITEM, token_ties=(None, 3, 0, 0, 0))
    assert "ties" not in render(token_table(ITEM, 0, {}, 80))
    assert "ties" in render(token_table(tied, 0, {}, 80))


def test_an_unscored_token_has_no_number() -> None:
    row = next(line for line in render(token_table(ITEM, 0, {}, 80)).splitlines() if "The" in line)
    assert row.split() == ["0", "1", "The", "–", "–"]


def test_a_candidate_without_a_known_piece_is_its_id() -> None:
    told = render(token_table(WITH_TOP, 0, {9: b" nine"}, 120), 120)
    assert "2:-0.1234 ·nine:-2.5000" in told


def test_what_could_not_be_computed_is_a_dash_and_no_zero() -> None:
    row = next(line for line in render(item_summary(ITEM)).splitlines() if "perplexity" in line)
    assert row.split() == ["perplexity", "–"]


@pytest.mark.parametrize(
    ("logprob", "style"), [(0.0, "green"), (-1.0, ""), (-3.0, "yellow"), (-5.0, "bold red"), (None, "dim")]
)
def test_a_surprise_has_its_colour(logprob: float | None, style: str) -> None:
    assert surprise_style(logprob) == style


def test_a_synthetic_answer_says_so() -> None:
    provenance = ModelProvenance(
        "m\x1b[2J", "", "f", "", "", "fake", "1", "float64", "float64", "cpu", "none", (), True
    )
    told = render(model_line(provenance))
    assert "synthetic" in told
    assert "\x1b" not in told
