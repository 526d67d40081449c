"""Masks on the command line: drawn, asked why, checked, digested, and obeyed by every asking command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.cells import cell_len

import dualtrace.cli as cli
from dualtrace.cli.mask_files import read_mask
from dualtrace.cli.mask_picture import columns_needed, draw
from dualtrace.cli.segments import find_once
from dualtrace.masks import json_form
from dualtrace.masks.spec import Causal, MaskSpec, Sliding
from dualtrace.problems import InvalidArgument, NotFound, Problem, Reason
from dualtrace.runs.run import read_run, run_to_text
from tests.support.tiny import tiny_model

TEXT = "the answer to this question"  # 7 tokens of the tiny model, and a prefix token
EIGHT = ["--ids", "5,6,7,8,9,10,11,12"]
CAUSAL: dict[str, Any] = {"causal": {}}
WINDOW = {"base": {"sliding": {"keys_back": 3}}}
FULL: dict[str, Any] = {"base": {"full": {}}}
CUT = {"base": CAUSAL, "edges": [{"queries": {"tokens": [4, 7]}, "keys": {"tokens": [1, 3]}, "layers": [1]}]}
NAMED = {"base": CAUSAL, "edges": [{"queries": {"segment": "completion"}, "keys": {"tokens": [0, 2]}}]}
EMPTY = {"base": {"minus": {"from": CAUSAL, "take": CAUSAL}}}


def run(*arguments: str | Path, stdin: str = "") -> Result:
    return CliRunner().invoke(cli.main, [str(one) for one in arguments], input=stdin)


def run_json(*arguments: str | Path) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def told(*arguments: str | Path, code: int = 2) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    return result.stderr


@pytest.fixture
def target() -> str:
    return f"reference:{tiny_model()}"


@pytest.fixture
def save(tmp_path: Path):  # type: ignore[no-untyped-def]
    def write(document: Any, name: str = "mask.json") -> Path:
        (tmp_path / name).write_text(document if isinstance(document, str) else json.dumps(document))
        return tmp_path / name

    return write


def save_array(path: Path, values: Any) -> None:
    np.save(path, values)


# ---- explain


def test_a_mask_is_drawn_with_the_tokens_of_its_rows(target: str, save: Any) -> None:
    lines = run("mask", "explain", target, "--text", TEXT, "--mask", save(WINDOW)).stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("4 ")]
    assert line.split() == ["4", "·to", "5", "·th", "▀██▄"]


def test_a_shape_explains_a_mask_without_any_model(save: Any) -> None:
    found = run_json("mask", "explain", "--shape", "2,3", "--length", "4", "--mask", save(WINDOW))
    assert found["rows"] == [[[0, 1]], [[0, 2]], [[0, 3]], [[1, 4]]]
    assert (found["leaking_rows"], found["tokens"]) == ([], None)


def test_one_layer_and_head_is_explained_alone(target: str, save: Any) -> None:
    asked = ["mask", "explain", target, *EIGHT, "--mask", save(CUT)]
    cut, kept = (run_json(*asked, "--layer", layer, "--head", "0")["rows"][5] for layer in ("1", "0"))
    assert (cut, kept) == ([[0, 1], [3, 6]], [[0, 6]])


def test_why_names_the_rule_that_decided(target: str, save: Any) -> None:
    asked = ["mask", "explain", target, *EIGHT, "--mask", save(CUT), "--why", "5,2,1,0", "--why", "5,2"]
    assert [answer["may_see"] for answer in run_json(*asked)["answers"]] == [False, True]
    assert "row 5 may not see key 2 at layer 1 head 0: edges[0] cuts it" in run(*asked).stdout


def test_the_files_written_hold_what_was_drawn(target: str, save: Any, tmp_path: Path) -> None:
    png, npy = tmp_path / "m.png", tmp_path / "m.npy"
    asked = ["mask", "explain", target, *EIGHT, "--mask", save(WINDOW), "--png", png, "--npy", npy]
    assert run(*asked).exit_code == 0
    rows = np.arange(8)
    expected = (rows[:, None] >= rows) & (rows[:, None] - rows < 3)
    np.testing.assert_array_equal(np.load(npy), expected)
    assert png.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_long_sequence_is_explained_but_not_drawn_unasked(save: Any) -> None:
    asked = ["mask", "explain", "--shape", "1,1", "--length", "300", "--mask", save(WINDOW)]
    assert "--allow-large" in run(*asked).stdout
    assert "█" not in run(*asked).stdout
    assert "█" in run(*asked, "--allow-large").stdout


def test_a_large_picture_is_refused_before_a_file_is_written(save: Any, tmp_path: Path) -> None:
    png = tmp_path / "m.png"
    asked = ["--shape", "1,1", "--length", "300", "--mask", save(WINDOW), "--png", png]
    assert "MASK_TOO_LARGE" in told("mask", "explain", *asked)
    assert not png.exists()


def test_rows_that_see_nothing_are_told_and_no_failure_of_explaining(target: str, save: Any) -> None:
    shown = run("mask", "explain", target, *EIGHT, "--mask", save(EMPTY))
    assert shown.exit_code == 0
    assert "96 (layer, head, row)" in shown.stdout  # 3 layers, 4 heads, 8 rows


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "give a TARGET, or --shape"),
        (["--shape", "1,1"], "--length"),
        (["--shape", "1", "--length", "3"], "LAYERS,HEADS"),
        (["--shape", "0,1", "--length", "3"], "LAYERS,HEADS"),
        (["fake:", "--shape", "1,1", "--length", "3"], "not both"),
        (["--shape", "1,1", "--length", "3", "--ids", "1"], "--length"),
        (["--shape", "1,1", "--text", "a"], "--tokenizer"),
        (["--shape", "2,2", "--length", "3", "--layer", "0"], "name a layer and a head"),
        (["--shape", "2,2", "--length", "3", "--layer", "2", "--head", "0"], "0-1"),
        (["--shape", "2,2", "--length", "3", "--why", "1"], "ROW,KEY"),
        (["--shape", "2,2", "--length", "3", "--why", "3,0"], "0-2"),
        (["--shape", "2,2", "--length", "3", "--segment-regex", "item=a"], "--segment"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else None,
)
def test_a_question_that_cannot_be_answered_is_refused(arguments: list[str], word: str, save: Any) -> None:
    assert word in told("mask", "explain", *arguments, "--mask", save(WINDOW))


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("width", [20, 60, 100])
def test_a_drawing_is_as_wide_as_it_says_and_fits_where_it_can(rows: int, width: int) -> None:
    pieces = [b" ordinarily-long", "猫".encode(), b"\x1b[2J", b"\xf0", b""] * 7
    drawn = [line.plain for line in draw(np.tri(rows, dtype=bool), pieces[:rows], 0, width, allow_large=True)]
    assert len({cell_len(line) for line in drawn[2:]}) == 1
    assert cell_len(drawn[2]) <= max(width, columns_needed(rows))


# ---- check and digest


def test_a_good_mask_ends_with_0(target: str, save: Any) -> None:
    assert run("mask", "check", target, "--text", TEXT, "--mask", save(WINDOW)).exit_code == 0


@pytest.mark.parametrize("document", [FULL, EMPTY], ids=["leaks", "empty rows"])
def test_a_mask_that_leaks_or_has_empty_rows_ends_with_1(document: Any, target: str, save: Any) -> None:
    assert run("mask", "check", target, "--text", TEXT, "--mask", save(document)).exit_code == 1


def test_empty_rows_are_no_fault_where_the_mask_says_what_becomes_of_them(save: Any) -> None:
    mask = save({**EMPTY, "empty_row": "SELF"})
    assert run("mask", "check", "--shape", "1,1", "--length", "4", "--mask", mask).exit_code == 0


def test_a_malformed_mask_ends_with_2_and_the_others_are_still_checked(save: Any) -> None:
    bad, good = save({"base": {"sliding": {"keys_bak": 3}}}, "bad.json"), save(WINDOW, "good.json")
    result = run("mask", "check", "--mask", bad, "--mask", good)
    assert result.exit_code == 2
    assert "bad.json: base.sliding.keys_bak" in result.stderr
    assert "good.json: good" in result.stdout


def test_a_mask_for_another_model_ends_with_2_and_says_what_there_is(save: Any) -> None:
    assert "0-0" in told("mask", "check", "--shape", "1,4", "--length", "8", "--mask", save(CUT))


def test_a_check_in_json_says_which_rows_leak(save: Any) -> None:
    result = run("mask", "check", "--shape", "1,1", "--length", "3", "--mask", save(FULL), "--json")
    (found,) = json.loads(result.stdout)["masks"]
    assert (result.exit_code, found["good"], found["leaking_rows"]) == (1, False, [0, 1])


def test_a_digest_is_that_of_the_parsed_mask(save: Any) -> None:
    spaced = save(json.dumps(WINDOW, indent=4), "spaced.json")
    digests = {run("mask", "digest", file).stdout for file in (save(WINDOW), spaced)}
    assert digests == {json_form.digest(MaskSpec(base=Sliding(3))) + "\n"}


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"base": {"causal": {}}, "base": {}}', '{"base": NaN}', '{"base":' * 5000, "[" * 100_000]
)
def test_what_is_no_mask_is_refused_with_the_files_name(text: str, save: Any) -> None:
    file = save(text)
    assert str(file) in told("mask", "digest", file)


# ---- arrays named by a file


def test_an_array_named_by_a_file_is_that_array(save: Any, tmp_path: Path) -> None:
    values = np.tril(np.ones((3, 3), bool))
    save_array(tmp_path / "m.npy", values)
    named = read_mask(str(save({"base": {"all": [CAUSAL, {"array": {"file": "m.npy"}}]}})))
    matrix = save({"base": {"all": [CAUSAL, {"array": {"matrix": values.tolist()}}]}}, "matrix.json")
    assert named.inline() == read_mask(str(matrix)).spec


def test_an_array_is_looked_for_beside_its_mask(save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "masks").mkdir()
    save_array(tmp_path / "masks" / "m.npy", np.ones((2, 2), bool))
    file = save({"base": {"array": {"file": "m.npy"}}}, "masks/mask.json")
    monkeypatch.chdir("/")
    assert len(read_mask(str(file)).arrays) == 1


def test_an_array_too_large_to_stand_in_a_request_goes_ahead(target: str, save: Any, tmp_path: Path) -> None:
    save_array(tmp_path / "m.npy", np.broadcast_to(np.tri(300, dtype=bool), (3, 4, 300, 300)))
    mask = save({"base": {"array": {"file": "m.npy"}}})
    found = run_json("rolling", target, "--ids", "5," * 299 + "5", "--mask", mask)
    assert list(found["question"]["variants"][0]["mask"]["base"]["array"]) == ["artifact_digest"]
    assert found["items"][0]["applied"]["metadata"]["digest"] == run("mask", "digest", mask).stdout.strip()


def test_arrays_stand_in_a_request_only_as_far_as_all_of_them_fit(target: str, save: Any, tmp_path: Path) -> None:
    save_array(tmp_path / "m.npy", np.broadcast_to(np.tri(200, dtype=bool), (3, 4, 200, 200)))  # 480,000 bytes
    masks = [save({"base": {"array": {"file": "m.npy"}}}, f"{name}.json") for name in "abc"]
    given = [part for mask in masks for part in ("--mask", mask)]
    variants = run_json("rolling", target, "--ids", "5," * 199 + "5", *given)["question"]["variants"]
    assert [next(iter(one["mask"]["base"]["array"])) for one in variants] == ["npy", "npy", "artifact_digest"]


@pytest.mark.parametrize(
    ("name", "word"),
    [("absent.npy", "No such file"), ("", "path"), (3, "path"), ("broken.npy", "magic"), (".", "read")],
)
def test_an_array_that_cannot_be_read_is_refused_by_its_place(
    name: object, word: str, save: Any, tmp_path: Path
) -> None:
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    with pytest.raises(Problem) as caught:
        read_mask(str(save({"base": {"any": [{"array": {"file": name}}]}})))
    assert word in str(caught.value)
    assert caught.value.detail.field.endswith("mask.json: base.any[0].array.file")


def test_a_stored_array_needs_a_target_that_stores_it(save: Any) -> None:
    mask = save({"base": {"array": {"artifact_digest": "sha256:" + "0" * 64}}})
    with pytest.raises(NotFound, match="nothing is stored here"):
        read_mask(str(mask)).fetch("sha256:" + "0" * 64)
    assert "give a TARGET" in told("mask", "check", "--shape", "1,1", "--length", "3", "--mask", mask)


# ---- segments


def test_a_segment_is_a_token_range(target: str, save: Any) -> None:
    asked = ["mask", "explain", target, *EIGHT, "--mask", save(NAMED), "--segment", "completion=6:8"]
    assert run_json(*asked)["rows"][5:] == [[[0, 6]], [[2, 7]], [[2, 8]]]


def test_an_expression_is_resolved_here_and_said(target: str, save: Any) -> None:
    asked = ["masked", target, "--text", TEXT, "--mask", save(NAMED), "--segment-regex", "completion=question"]
    result = run(*asked, "--json")
    assert json.loads(result.stdout)["question"]["segments"] == [["completion", [6, 7]]]
    assert "segment completion: characters 19-27, tokens 6:7, ·question" in result.stderr


@pytest.mark.parametrize(
    ("pattern", "word"), [("zebra", "nowhere"), ("t", "more than once"), ("^", "no characters"), ("$", "no characters")]
)
def test_an_expression_that_does_not_match_exactly_once_is_refused(pattern: str, word: str) -> None:
    with pytest.raises(InvalidArgument, match=word):
        find_once(pattern, TEXT, "item")


def test_expressions_are_not_run_over_endless_texts() -> None:
    with pytest.raises(InvalidArgument) as caught:
        find_once("a", "b" * 200_001, "item")
    assert caught.value.reason is Reason.TOO_MANY


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["--segment", "completion"], "NAME="), (["--segment", "answer=1:2"], "completion"),
        (["--segment", "item=2"], "START:END"), (["--segment", "item=-1:2"], "START:END"),
        (["--segment", "item=0:1", "--segment", "item=1:2"], "twice"),
        (["--segment-regex", "item=("], "no regular expression"), (["--segment", "item=0:99"], "0-7"),
        (["--read", "x"], "START:END"), (["--read", "3:3"], "empty"), (["--read", "query"], "no segment 'query'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_a_segment_or_read_that_is_none_is_refused(given: list[str], word: str, target: str, save: Any) -> None:
    assert word in told("masked", target, "--text", TEXT, "--mask", save(WINDOW), *given)


# ---- asking under masks


def test_masked_measures_every_mask_against_the_model_as_it_is(target: str, save: Any) -> None:
    asked = ["masked", target, "--text", TEXT, "--mask", save(WINDOW), "--mask", save(CUT, "cut.json"), "--kl"]
    base, window, cut = run_json(*asked)["items"]
    assert base["token_kl_base_masked"] == [0.0] * 7
    assert window["token_logprobs"][:3] == pytest.approx(base["token_logprobs"][:3], abs=1e-12)
    assert min(window["token_kl_base_masked"][3:]) > 1e-6
    assert (cut["applied"]["receipt"]["layers_hit"], cut["applied"]["receipt"]["entries_cut"]) == ([1], 3 * 2 * 4)


def test_the_masked_tables_show_differences_divergences_and_receipts(target: str, save: Any) -> None:
    shown = run("masked", target, "--text", TEXT, "--mask", save(WINDOW), "--kl").stdout
    for word in ("difference", "KL(base|masked)", "KL(masked|base)", "v1 mask.json", "entries cut", "effective"):
        assert word in shown


def test_masked_reads_only_what_it_is_told_to(target: str, save: Any) -> None:
    asked = ["masked", target, "--text", TEXT, "--mask", save(WINDOW), "--read", "2:3", "--read", "5:7"]
    item = run_json(*asked)["items"][1]
    assert [index for index, value in enumerate(item["token_logprobs"]) if value is not None] == [2, 5, 6]
    assert run(*asked).exit_code == 0


def test_masked_without_anything_to_compare_with_is_refused(target: str) -> None:
    assert "--mask or --view" in told("masked", target, "--text", TEXT)


ASKING = {
    "logprob": ["--prompt", "the answer", "--completion", " to this question", "--top-k", "2"],
    "rolling": ["--text", TEXT],
    "next": ["--prompt", TEXT, "--top-k", "2"],
    "score": ["--query", "the answer", "--item", " to this", "--labels", "5,6"],
    "masked": ["--text", TEXT, "--kl", "--top-k", "2"],
}


@pytest.mark.parametrize("command", ASKING)
def test_a_run_under_masks_survives_reading_and_writing(command: str, target: str, save: Any, tmp_path: Path) -> None:
    rows = 8 if command in {"rolling", "next", "masked"} else None
    save_array(tmp_path / "m.npy", np.tri(rows or 8, dtype=bool))
    array = ["--mask", save({"base": {"array": {"file": "m.npy"}}}, "array.json")] if rows else []
    result = run(command, target, *ASKING[command], "--mask", save(WINDOW), *array, "--with-base", "--json")
    assert result.exit_code == 0, result.output
    text = result.stdout.rstrip("\n")
    assert run_to_text(read_run(text)) == text
    assert len(read_run(text).question.variants) == (3 if rows else 2)  # type: ignore[union-attr]


@pytest.mark.parametrize("command", ASKING)
def test_every_asking_command_shows_its_receipts(command: str, target: str, save: Any) -> None:
    result = run(command, target, *ASKING[command], "--mask", save(WINDOW), "--with-base")
    assert result.exit_code == 0, result.output
    assert "mask.json: " in result.stdout
    assert "entries cut in layers 0-2, heads 0-3" in result.stdout


def test_variants_stand_side_by_side_with_their_differences(target: str, save: Any) -> None:
    asked = ["logprob", target, "--prompt", "the answer", "--completion", " to this question"]
    result = run(*asked, "--mask", save(WINDOW), "--with-base")
    assert "v1  mask.json" in result.stdout
    items = run_json(*asked, "--mask", save(WINDOW), "--with-base")["items"]
    left, right = (item["token_logprobs"][-1] for item in items)
    (line,) = [line for line in result.stdout.splitlines() if "·question" in line and line.startswith("6")]
    assert line.split()[3:] == [f"{left:.4f}", f"{right:.4f}", f"{right - left:+.4f}"]


def test_a_leak_is_refused_for_its_variant_and_the_others_are_shown(target: str, save: Any) -> None:
    result = run("rolling", target, "--text", TEXT, "--mask", save(FULL), "--with-base")
    assert result.exit_code == 1
    assert "item 0, v1: error: row 0 sees the token it predicts" in result.stderr
    assert "·question" in result.stdout


def test_a_leak_can_be_allowed(target: str, save: Any) -> None:
    assert run("rolling", target, "--text", TEXT, "--mask", save(FULL), "--allow-leak").exit_code == 0


def test_allowing_leaks_without_a_mask_is_a_mistake(target: str) -> None:
    assert "--allow-leak" in told("rolling", target, "--text", TEXT, "--allow-leak")


def test_a_mask_may_come_from_standard_input(target: str) -> None:
    result = run("rolling", target, "--text", TEXT, "--mask", "-", "--json", stdin=json.dumps(WINDOW))
    assert read_run(result.stdout).question.variants[0].mask == MaskSpec(base=Sliding(3))  # type: ignore[union-attr]


def test_the_base_is_not_asked_twice(target: str, save: Any) -> None:
    mask = save({"base": CAUSAL})
    variants = run_json("rolling", target, "--text", TEXT, "--mask", mask, "--with-base")["question"]["variants"]
    assert [one["mask"] is None for one in variants] == [True, False]
    assert len(run_json("rolling", target, "--text", TEXT, "--with-base")["question"]["variants"]) == 1
    assert read_mask(str(mask)).spec == MaskSpec(base=Causal())


def test_packed_items_score_as_they_do_alone(target: str) -> None:
    asked = ["score", target, "--query-ids", "5,6,7", "--item-ids", "8,9", "--item-ids", "10", "--labels", "11,12"]
    alone, packed = (run_json(*asked, *more)["results"] for more in ([], ["--packing", "hidden"]))
    assert [entry["scores"] for entry in packed] == [pytest.approx(entry["scores"], rel=1e-12) for entry in alone]
    assert packed[0]["applied"] is not None


def test_a_visible_delimiter_needs_its_id(target: str) -> None:
    asked = ["score", target, "--query-ids", "5", "--item-ids", "8", "--labels", "11", "--packing", "visible"]
    assert "delimiter_token_id" in told(*asked)
    assert run(*asked, "--delimiter", "3").exit_code == 0


@pytest.mark.parametrize("kind", [[], {}, None, 1])
def test_a_run_whose_questions_kind_is_no_word_is_refused(kind: object, target: str) -> None:
    document = run_json("rolling", target, "--text", TEXT)
    document["question"]["kind"] = kind
    with pytest.raises(InvalidArgument) as caught:
        read_run(json.dumps(document))
    assert caught.value.reason is Reason.UNKNOWN_ENUM_VALUE
