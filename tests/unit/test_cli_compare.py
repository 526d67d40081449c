"""`dualtrace compare` and `diff` in one process: what they print, write and end with."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.cells import cell_len
from rich.console import Console

import dualtrace.cli as cli
from dualtrace.cli.compare_tables import choose_rows, left_out_line, token_table
from dualtrace.cli.pair_book import ItemPairs
from dualtrace.cli.tables import name_engine
from dualtrace.cli.trace_plot import draw_apart, plot_traces, shrink
from dualtrace.compare.events import FirstDivergence, TokenPairs
from dualtrace.compare.pass_rule import TokenStatus
from dualtrace.compare.report import read_report
from dualtrace.runs.run import read_run
from tests.support.compared import PROVENANCE

TEXT = ("--text", "hello the answer is now here")
PLANTED = "fake:plant_at=5"  # row 5 predicts token 6
QUESTIONS = {
    "text": TEXT,
    "ids": ("--ids", "1,2,3,4,5,6,7,8"),
    "pair": ("--prompt", "The", "--completion", " answer is", "--completion", " no"),
    "next": ("--next", "hello", "--top-k", "3"),
    "score": ("--query", "Is it ", "--item", "so", "--item", "not", "--labels", "5,6"),
    "label texts": ("--query", "Is it ", "--item", "so", "--label", "a", "--label", "b"),
}


def run(*arguments: str | Path, stdin: str = "") -> Result:
    return CliRunner().invoke(cli.main, [str(one) for one in arguments], input=stdin)


def compare(*arguments: str | Path, code: int = 0, stdin: str = "") -> Result:
    result = run("compare", *arguments, stdin=stdin)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.mark.parametrize("name", QUESTIONS)
def test_equal_sides_pass_with_0(name: str) -> None:
    assert "verdict: PASS" in compare("fake:", "fake:", *QUESTIONS[name]).stdout


@pytest.mark.parametrize("name", QUESTIONS)
def test_other_weights_fail_with_1_and_say_how_to_repeat_it(name: str) -> None:
    out = compare("fake:", "fake:seed=1", *QUESTIONS[name], code=1).stdout
    assert "verdict: FAIL" in out
    assert out.rstrip().splitlines()[-2] == "reproduce with:"
    assert "dualtrace compare fake: fake:seed=1" in out.rstrip().splitlines()[-1]


def test_the_reproducing_command_is_quoted_for_a_shell() -> None:
    out = compare("fake:", PLANTED, "--text", "it's now here; rm $HOME", code=1).stdout
    assert """dualtrace compare fake: fake:plant_at=5 --text 'it'"'"'s now here; rm $HOME'""" in out


def test_provenance_differences_stand_before_the_tokens() -> None:
    out = compare("fake:", PLANTED, *TEXT, code=1).stdout
    assert out.index("weights_digest") < out.index("·answer")


def test_who_the_sides_are_stands_there_once() -> None:
    out = compare("fake:", PLANTED, *TEXT, code=1).stdout
    assert (out.count("weights_digest"), out.count("tolerance float64"), out.count("left   fake:")) == (1, 1, 1)
    assert "\x1b" not in out


def test_an_engines_name_is_told_once() -> None:
    known = replace(PROVENANCE, framework="torch", framework_version="torch 2.13.0, transformers 5.23.0")
    assert name_engine(known) == "torch 2.13.0, transformers 5.23.0"
    assert (
        name_engine(replace(known, framework="reference", framework_version="numpy 2.4.6")) == "reference numpy 2.4.6"
    )


def test_a_profile_may_be_asked_by_its_name() -> None:
    assert "tolerance float32-highest: " in compare("fake:", "fake:", *TEXT, "--tolerance", "float32-highest").stdout


def test_the_first_divergence_is_marked_at_its_token() -> None:
    lines = compare("fake:", PLANTED, *TEXT, code=1).stdout.splitlines()
    marked = next(index for index, line in enumerate(lines) if "◀ first" in line)
    assert lines[marked].split()[:3] == ["6", "287", "·is"]
    assert set(lines[marked - 1]) <= {"━", " "}


def test_without_right_both_sides_are_left() -> None:
    assert "verdict: PASS" in compare("fake:seed=4", *TEXT).stdout


def test_a_json_report_can_be_read_back() -> None:
    report = read_report(compare("fake:", PLANTED, *TEXT, "--json", code=1).stdout)
    assert (report.verdict.value, report.left.target, report.right.target) == ("FAIL", "fake:", PLANTED)
    assert report.reproduce.startswith("dualtrace compare fake:")


def test_a_tolerance_that_is_given_is_used_and_named() -> None:
    out = compare("fake:", PLANTED, *TEXT, "--abs-epsilon", "0.1").stdout
    assert "tolerance request: |l - r| <= 0.1 + 0" in out


def test_a_gate_may_allow_mismatches() -> None:
    compare("fake:", PLANTED, *TEXT, "--max-mismatches", "1")


def test_a_side_that_cannot_be_reached_ends_with_3_and_the_other_answer_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    result = compare("fake:", "grpc://127.0.0.1:9", *TEXT, "--save-left", kept, "--timeout", "5", code=3)
    assert "verdict: ERROR" in result.stdout
    assert read_run(kept.read_text()).complete


def test_a_side_that_fails_otherwise_ends_with_1() -> None:
    assert "planted failure" in compare("fake:", "fake:fail_at=3", *TEXT, code=1).stdout


def test_a_side_that_is_too_slow_ends_with_3() -> None:
    result = compare("fake:", "fake:step=1,step_ms=400", *TEXT, "--timeout", "0.3", code=3)
    assert "right" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fake:", "fake:"), "nothing was asked"),
        (("fake:", "--text", "a", "--next", "b"), "different questions"),
        (("fake:", "--text", "a", "--softmax"), "--softmax"),
        (("fake:", "--query", "a", "--item", "b", "--labels", "1", "--top-k", "3"), "--top-k"),
        (("fake:", "--query", "a", "--item", "b"), "labels"),
        (("fake:", "--prompt", "a"), "--completion"),
        (("fake:", "--text", "a", "--abs-epsilon", "-1"), "abs_epsilon"),
        (("fake:", "--text", "a", "--allow-leak"), "--allow-leak"),
        (("fake:", "--text-file", "-", "--mask", "-"), "standard input"),
        (("torch:/nowhere/at/all", "--text", "a"), "names no folder"),
        (("nonsense", "--text", "a"), "not understood"),
        (("missing.json", "--text", "a"), "no such file"),
        (("fake:", "--text", "a", "--dtype", "float32"), "dtype"),
        (("backend:a", "fake:", "--text", "a"), "backend"),
        (("backend:a", "backend:b", "--text", "a", "--coordinator", "http://x"), "--coordinator"),
        (("backend:a", "backend:b", "--text", "a", "--coordinator", "x:1", "--key", __file__), "grpcs://"),
        (("run:a", "fake:", "--coordinator", "http://x"), "--coordinator"),
        (("fake:", "--text", "a", "--read", "0:1", "--stride", "2"), "one window"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else value,
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(arguments: tuple[str, ...], said: str) -> None:
    result = compare(*arguments, code=2, stdin='{"base": {"causal": {}}}')
    assert said in result.stderr
    assert result.stdout == ""


def test_a_port_without_precision_asks_for_a_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flat_port.py").write_text(
        "import numpy\n\n\ndef logits(ids):\n    return numpy.zeros((len(ids), 500))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "abs_epsilon" in compare("fake:", "py:flat_port:logits", *TEXT, code=2).stderr
    out = compare("fake:", "py:flat_port:logits", *TEXT, "--abs-epsilon", "1e-6", code=1).stdout
    assert "verdict: FAIL" in out


# Files


def saved(tmp_path: Path, *arguments: str) -> tuple[Path, Path]:
    files = tmp_path / "left.json", tmp_path / "right.json"
    run("compare", *arguments, "--save-left", files[0], "--save-right", files[1])
    return files


@pytest.mark.parametrize("name", ["text", "pair", "score"])
def test_two_saved_answers_differ_offline_as_they_did_live(name: str, tmp_path: Path) -> None:
    left, right = saved(tmp_path, "fake:", PLANTED if name == "text" else "fake:seed=1", *QUESTIONS[name])
    live = compare("fake:", PLANTED if name == "text" else "fake:seed=1", *QUESTIONS[name], "--json", code=1)
    stored = run("diff", left, right, "--json")
    assert stored.exit_code == 1
    ours, theirs = read_report(stored.stdout), read_report(live.stdout)
    assert (ours.tokens, ours.labels, ours.scores) == (theirs.tokens, theirs.labels, theirs.scores)
    assert run("diff", left, left).exit_code == 0


def test_diff_says_how_to_repeat_it(tmp_path: Path) -> None:
    left, right = saved(tmp_path, "fake:", PLANTED, *TEXT)
    assert run("diff", left, right).stdout.rstrip().splitlines()[-1].strip() == f"dualtrace diff {left} {right}"


def test_diff_refuses_a_live_side(tmp_path: Path) -> None:
    left, _right = saved(tmp_path, "fake:", *TEXT)
    result = run("diff", left, "fake:")
    assert (result.exit_code, "no stored answer" in result.stderr) == (2, True)


def test_a_run_of_an_unknown_major_version_is_refused(tmp_path: Path) -> None:
    left, right = saved(tmp_path, "fake:", *TEXT)
    document = json.loads(right.read_text())
    right.write_text(json.dumps({**document, "score_debug_schema_version": "9.0"}))
    result = run("diff", left, right)
    assert result.exit_code == 2
    assert "9.0" in result.stderr
    assert str(right) in result.stderr


def test_a_file_that_is_no_run_is_named(tmp_path: Path) -> None:
    left, _right = saved(tmp_path, "fake:", *TEXT)
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert str(other) in run("diff", left, other).stderr


def test_a_stored_run_asks_its_own_question_of_a_live_side(tmp_path: Path) -> None:
    left, _right = saved(tmp_path, "fake:", *TEXT)
    assert "verdict: PASS" in compare(left, "fake:").stdout
    assert "verdict: FAIL" in compare(left, "fake:seed=1", code=1).stdout


def test_a_stored_run_takes_no_mask_of_its_own(tmp_path: Path) -> None:
    left, _right = saved(tmp_path, "fake:", *TEXT)
    result = compare(left, "fake:", "--left-view", "finetuned:x", code=2)
    assert "stored answer" in result.stderr


def test_csv_holds_every_token_even_when_the_report_does_not(tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    compare("fake:", PLANTED, *TEXT, "--csv", file, "--keep-tokens", "2", code=1)
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    assert [row["index"] for row in rows] == [str(index) for index in range(12)]
    assert [row["index"] for row in rows if row["status"] == "MISMATCH"] == ["6"]
    assert float(rows[6]["right_minus_left"]) == float(rows[6]["right_logprob"]) - float(rows[6]["left_logprob"])


def test_a_piece_in_csv_is_no_formula(tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    compare("fake:", "--text", "a =1+1", "--csv", file)
    assert not [row for row in csv.DictReader(io.StringIO(file.read_text())) if row["piece"].startswith(("=", "+"))]


class _Page(HTMLParser):
    """What a browser would fetch or run, and whether the tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in {"src", "href", "onload", "onclick", "action"}]
        if tag not in {"meta", "br", "path", "text"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"meta", "br", "path", "text"}:
            assert self.open.pop() == tag


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_page_is_whole_and_fetches_nothing(name: str, tmp_path: Path) -> None:
    file = tmp_path / "out.html"
    compare("fake:", "fake:seed=1", *QUESTIONS[name], "--html", file, code=1)
    page = _Page()
    page.feed(file.read_text())
    assert (page.open, page.fetched) == ([], [])
    assert "script" not in page.tags
    assert "url(" not in file.read_text()


def test_hostile_text_is_escaped_on_the_page_and_on_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "out.html"
    text = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m & \u202e so"
    out = compare("fake:", "fake:seed=1", "--text", text, "--text", "b", "--html", file, code=1).stdout
    assert "\x1b[31m" not in out
    assert "\u202e" not in out
    assert not [tag for tag in ("<script", "</script", "<img") if tag in file.read_text()]
    assert "default-src 'none'" in file.read_text()  # and were it there, a browser would not run it
    assert "\u202e" not in file.read_text()


def test_the_picture_on_the_page_is_well_formed(tmp_path: Path) -> None:
    file = tmp_path / "out.html"
    compare("fake:", PLANTED, *TEXT, "--html", file, code=1)
    drawn = re.search(r"<svg.*?</svg>", file.read_text(), re.DOTALL)
    assert drawn is not None
    assert ET.fromstring(drawn[0]).tag == "svg"
    assert "first divergence: token 6" in drawn[0]


# What a long text shows


def pairs_of(count: int, bad: tuple[int, ...] = ()) -> ItemPairs:
    deltas = [1.0 if place in bad else 0.0 for place in range(count)]
    statuses = tuple(TokenStatus.MISMATCH if place in bad else TokenStatus.MATCH for place in range(count))
    left = tuple(-2.0 for _ in deltas)
    pairs = ItemPairs()
    pairs.add(
        TokenPairs(0, 0, tuple(range(count)), None, statuses, left, tuple(-2.0 + one for one in deltas),
                   (1,) * count, (1,) * count)
    )  # fmt: skip
    pairs.divergence = FirstDivergence(0, bad[0], -2.0, -1.0) if bad else None
    return pairs


def test_a_long_text_shows_the_first_divergence_with_its_surroundings_and_the_worst() -> None:
    rows = choose_rows(pairs_of(4000, (1000, 3000)), all_tokens=False)
    assert {992, 1000, 1008, 3000} <= set(rows)
    assert len(rows) < 40


def test_a_long_text_says_how_much_of_it_is_shown() -> None:
    (line,) = left_out_line(pairs_of(4000, (1000,)), all_tokens=False)
    assert line.plain.startswith("17 of 4000 tokens")
    assert list(left_out_line(pairs_of(4000, (1000,)), all_tokens=True)) == []


WORDS = ("中文字符漢字", " supercalifragilisticexpialidocious", "🙂🙂", "\u202e", "é")


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_line_of_the_table_is_no_longer_than_the_terminal_is_wide(width: int) -> None:
    pairs, count = ItemPairs(), 20
    values = tuple(-12.34567 - place for place in range(count))
    pieces = tuple(WORDS[place % len(WORDS)].encode() for place in range(count))
    pairs.add(
        TokenPairs(0, 4000, tuple(range(128_000, 128_000 + count)), pieces, (TokenStatus.MISMATCH,) * count, values,
                   tuple(value - 1 for value in values), (12_345,) * count, (112_345,) * count)
    )  # fmt: skip
    pairs.divergence = FirstDivergence(0, 4000, -1.0, -2.0)
    console = Console(width=width)
    with console.capture() as captured:
        console.print(token_table(pairs, width, all_tokens=False))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    assert max(cell_len(line) for line in lines) <= width
    assert "-12.34567" in lines[3]  # no number was cut
    assert "DIFFERS ◀ first" in lines[3]


def test_all_tokens_shows_all() -> None:
    assert choose_rows(pairs_of(4000), all_tokens=True) == list(range(4000))


def test_a_spike_is_never_averaged_away() -> None:
    assert max(one for one in shrink([0.0] * 500 + [9.0] + [0.0] * 500, 60) if one is not None) == 9.0


def test_the_plot_marks_the_divergence_below_its_column() -> None:
    lines = plot_traces(pairs_of(20, (7,)), 80)
    assert lines[-1].plain.index("^") == 6 + 7


def test_no_difference_at_all_is_drawn_as_a_dot_and_a_tiny_one_as_a_block() -> None:
    assert draw_apart([0.0, 1e-12, None]) == "·▁ "


def test_few_tokens_make_no_plot() -> None:
    assert plot_traces(pairs_of(3), 80) == []


def test_a_numbers_absence_is_drawn_as_nothing() -> None:
    pairs: Any = pairs_of(8)
    pairs.left_logprobs[0] = None
    assert plot_traces(pairs, 80)[0].plain[6] == " "
