"""The commands against the fake engine and a tiny model: what they print where, and with which code they end."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import dualtrace.cli as cli
from dualtrace.problems import (
    BadNumbers,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    Problem,
    Reason,
    Unavailable,
)
from dualtrace.runs.run import read_run
from tests.support.tiny import tiny_model

TEXT = "The answer is 🙂."
ASKING = ("describe", "tokenize", "logprob", "rolling", "next", "score", "health")
EXAMPLES = {
    "tokenize": ["--text", TEXT],
    "logprob": ["--prompt", "The", "--completion", " answer", "--top-k", "2"],
    "rolling": ["--text", TEXT, "--prefix", "bos", "--max-tokens", "8", "--stride", "3"],
    "next": ["--prompt", "The", "--top-k", "3", "--extra-ids", "7,5"],
    "score": ["--query", "Is it? ", "--item", "yes", "--item", "no", "--labels", "5,6", "--softmax"],
}


def run(*arguments: str | Path, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(cli.main, [str(one) for one in arguments], input=stdin)


def run_json(*arguments: str | Path, stdin: str | bytes = "") -> Any:
    result = run(*arguments, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: str | Path, code: int = 2, stdin: str | bytes = "") -> str:
    """What a refusal says on standard error; nothing else may be said on standard output."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def walk(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    found = [(path, command)]
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            found += walk(below, (*path, name))
    return found


LEAVES = [(path, command) for path, command in walk(cli.main) if not isinstance(command, click.Group)]


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=[" ".join(path) for path, _ in LEAVES])
def test_every_command_can_write_json_and_show_tracebacks(path: Sequence[str], command: click.Command) -> None:
    options = {name for parameter in command.params for name in parameter.opts}
    assert {"--json", "--debug"} <= options


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=[" ".join(path) for path, _ in LEAVES])
def test_every_command_has_help_that_can_be_shown(path: Sequence[str], command: click.Command) -> None:
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert command.help


def test_the_version_is_shown() -> None:
    assert run("--version").stdout.startswith("dualtrace, version ")


@pytest.mark.parametrize("command", EXAMPLES)
@pytest.mark.parametrize("target", ["fake:", "tiny"])
def test_an_asking_command_prints_a_table(command: str, target: str) -> None:
    result = run(command, f"reference:{tiny_model()}" if target == "tiny" else target, *EXAMPLES[command])
    assert result.exit_code == 0, result.output
    assert result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("command", EXAMPLES)
def test_an_asking_command_writes_a_run_that_can_be_read(command: str) -> None:
    result = run(command, "fake:", *EXAMPLES[command], "--json")
    assert result.stdout.count("\n") == 1
    stored = read_run(result.stdout)
    assert (stored.complete, stored.target) == (True, "fake:")


def test_the_rolling_table_adds_up_to_what_the_json_says() -> None:
    total = run_json("rolling", "fake:", *EXAMPLES["rolling"])["items"][0]["total_logprob"]
    assert f"{total:.4f}" in run("rolling", "fake:", *EXAMPLES["rolling"]).stdout


def test_ids_give_what_their_text_gives() -> None:
    ids = run_json("tokenize", "fake:", "--text", TEXT)["results"][0]["token_ids"]
    by_ids = run_json("rolling", "fake:", "--ids", ",".join(str(one) for one in ids))["items"][0]
    assert by_ids["token_logprobs"] == run_json("rolling", "fake:", "--text", TEXT)["items"][0]["token_logprobs"]


def test_several_completions_share_one_prompt() -> None:
    found = run_json("logprob", "fake:", "--prompt", "The", "--completion", " a", "--completion", " b")
    assert [item["prompt"]["text"] for item in found["question"]["items"]] == ["The", "The"]
    assert len(found["items"]) == 2


def test_completions_as_ids_follow_a_prompt_of_ids() -> None:
    found = run_json("logprob", "fake:", "--prompt-ids", "5,6", "--completion-ids", "7 8", "--prefix", "9")
    item = found["items"][0]
    assert (item["token_ids"], item["prefix_token_id"], item["scored_start"]) == ([5, 6, 7, 8], 9, 2)


def test_items_come_from_a_file_of_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt_ids": [], "completion_ids": [5, 6]}\n')
    assert [item["token_ids"] for item in run_json("logprob", "fake:", "--items", file)["items"]][1] == [5, 6]


@pytest.mark.parametrize(
    "line",
    [
        "nothing", "[]", '{"prompt": "a"}', '{"prompt": "a", "completion": 1}',
        '{"prompt": "a", "completion_ids": [1]}',
        '{"prompt": "a", "completion": "b", "mood": 1}', '{"prompt_ids": [true], "completion_ids": [1]}',
        '{"prompt_ids": [4294967296], "completion_ids": [1]}',
    ],
)  # fmt: skip
def test_a_line_that_is_no_item_is_refused_by_its_number(line: str) -> None:
    told = refused("logprob", "fake:", "--items", "-", stdin='{"prompt": "a", "completion": "b"}\n' + line)
    assert "line 2" in told


def test_a_file_is_taken_exactly_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"a\r\n")
    assert run_json("tokenize", "fake:", "--file", file)["question"]["inputs"][0]["text"] == "a\r\n"


def test_a_dash_reads_standard_input() -> None:
    assert run_json("tokenize", "fake:", "--file", "-", stdin="é")["question"]["inputs"][0]["text"] == "é"


def test_standard_input_is_not_read_twice() -> None:
    assert "once" in refused("tokenize", "fake:", "--file", "-", "--file", "-", stdin="x")


def test_a_file_that_is_not_utf8_is_refused_with_the_place() -> None:
    assert "byte 1 is 0xff" in refused("rolling", "fake:", "--file", "-", stdin=b"a\xff")


def test_an_argument_that_is_not_unicode_is_refused() -> None:
    assert "INVALID_TEXT" in refused("rolling", "fake:", "--text", "\udcff")


@pytest.mark.parametrize("ids", ["1,x", "1.5", "99999999999999999999", "4294967296", "1,-"])
def test_what_is_no_id_is_refused(ids: str) -> None:
    assert "MALFORMED" in refused("rolling", "fake:", "--ids", ids)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["tokenize", "fake:"], "--text"),
        (["rolling", "fake:"], "--text"),
        (["next", "fake:"], "--prompt"),
        (["logprob", "fake:", "--prompt", "a"], "--completion"),
        (["logprob", "fake:", "--completion", "a"], "--prompt"),
        (["logprob", "fake:", "--prompt", "a", "--prompt-ids", "1", "--completion", "b"], "not 2"),
        (["logprob", "fake:", "--prompt", "a", "--items", "-"], "--items"),
        (["score", "fake:", "--query", "q", "--item", "i"], "none given"),
        (["score", "fake:", "--query", "q", "--labels", "1", "--item-labels", "2"], "exactly one"),
        (["score", "fake:", "--item", "i", "--labels", "1"], "--query"),
        (["score", "fake:", "--query", "q", "--item", "i", "--labels", "1,1"], "twice"),
        (["score", "fake:", "--query", "q", "--item", "i", "--labels", "1", "--temperature", "nan"], "softmax"),
        (["rolling", "fake:", "--text", "a", "--prefix", "sos"], "none, bos, eos"),
        (["rolling", "fake:", "--text", "a b", "--max-tokens", "4", "--stride", "5"], "1-4"),
        (["rolling", "fake:", "--text", "a", "--top-k", "-1"], "top_k -1"),
        (["next", "fake:", "--prompt", "a", "--extra-ids", "5,5"], "twice"),
        (["describe", "nowhere"], "grpc://HOST:PORT"),
        (["describe", "reference:"], "names nothing"),
        (["describe", "fake:mood=1"], "mood"),
        (["describe", "reference:/does/not/exist"], "/does/not/exist"),
        (["describe", "py:no_such_module_at_all:f"], "no_such_module_at_all"),
        (["describe", "grpc://x", "--ca-file", __file__], "grpcs://"),
        (["health", "fake:"], "grpc://"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_wrong_usage_ends_with_2_and_says_what_is_allowed(arguments: list[str], word: str) -> None:
    assert word in refused(*arguments)


def test_a_folder_without_reference_in_front_gets_a_hint() -> None:
    assert f"reference:{tiny_model()}" in refused("describe", str(tiny_model()))


def test_an_option_that_click_refuses_ends_with_2_too() -> None:
    assert run("logprob", "fake:", "--boundary", "loose").exit_code == 2


def test_a_sidecar_that_is_not_there_ends_with_3() -> None:
    assert "127.0.0.1:1" in refused("describe", "grpc://127.0.0.1:1", code=3)


def test_one_failed_item_ends_with_1_and_the_others_are_shown() -> None:
    result = run("logprob", "fake:", "--prompt", "a", "--completion", "", "--completion", " b")
    assert result.exit_code == 1
    assert "item 0: error: the completion is empty" in result.stderr
    assert "·b" in result.stdout


def test_when_every_item_is_wrong_the_code_is_that_of_the_mistake() -> None:
    assert run("logprob", "fake:", "--prompt", "a", "--completion", "").exit_code == 2


def test_a_model_with_nan_ends_with_1_and_names_the_place() -> None:
    result = run("rolling", "fake:nan_at=2", "--text", TEXT)
    assert result.exit_code == 1
    assert "NON_FINITE_LOGITS" in result.stderr


def test_an_engine_that_fails_ends_with_1_and_no_traceback() -> None:
    result = run("rolling", "fake:fail_at=2", "--text", TEXT)
    assert (result.exit_code, "Traceback" in result.stderr) == (1, False)
    assert "planted failure" in result.stderr


def test_a_timeout_ends_with_3_long_before_the_answer_would_have_come() -> None:
    begun = time.monotonic()
    assert "deadline" in refused("rolling", "fake:step=1,step_ms=5000", "--text", TEXT, "--timeout", "0.2", code=3)
    assert time.monotonic() - begun < 4


def test_what_had_come_before_the_time_was_up_is_shown_and_called_incomplete() -> None:
    result = run("rolling", "fake:step=4,step_ms=60", "--ids", "5 " * 400, "--timeout", "1", "--json")
    assert result.exit_code == 3
    assert "not complete" in result.stderr
    assert read_run(result.stdout).complete is False


def test_a_label_text_becomes_its_token() -> None:
    found = run_json("score", "fake:", "--query", "q", "--item", "i", "--label-text", "a", "--label-text", " the")
    assert len(found["results"][0]["label_token_ids"]) == 2
    assert sum(found["results"][0]["scores"]) < 1


def test_a_label_text_of_several_tokens_is_refused_with_its_tokens() -> None:
    told = refused("score", "fake:", "--query", "q", "--item", "i", "--label-text", " zebra")
    assert "a label must be exactly one" in told
    assert "·" in told


def test_labels_may_differ_by_item() -> None:
    given = ["--item", "a", "--item", "b", "--item-labels", "5", "--item-labels", "6,7"]
    found = run_json("score", "fake:", "--query", "q", *given)
    assert [entry["label_token_ids"] for entry in found["results"]] == [[5], [6, 7]]


def test_no_items_is_an_empty_success() -> None:
    assert run_json("score", "fake:", "--query", "q", "--labels", "5")["results"] == []


def test_a_python_function_is_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tiny_port.py").write_text(
        "import numpy as np\ndef logits(ids):\n    return np.zeros((len(ids), 4), np.float32)\n"
    )
    monkeypatch.chdir(tmp_path)
    item = run_json("rolling", "py:my_tiny_port:logits", "--ids", "1,2,3")["items"][0]
    assert item["token_logprobs"][1:] == pytest.approx([-1.3862943611] * 2)


def test_describe_tells_the_same_digest_as_an_answer() -> None:
    card = run_json("describe", "fake:")
    answer = run_json("next", "fake:", "--prompt", "a")
    assert card["provenance"]["digest"] == answer["provenance"]["digest"]


def test_a_hostile_message_cannot_drive_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise InvalidArgument(Reason.MALFORMED, "\x1b[2Jgone \u202e", field="\x07", allowed="\x9b")

    monkeypatch.setattr("dualtrace.cli.asking.open_target", refuse)
    told = refused("describe", "fake:")
    assert not set(told) & set("\x1b\x07\x9b\u202e")


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (InvalidArgument(Reason.MALFORMED, "m"), 2),
        (NotFound(Reason.NOT_FOUND, "m"), 2),
        (Unavailable(Reason.UNREACHABLE, "m"), 3),
        (DeadlineExceeded(Reason.DEADLINE, "m"), 3),
        (Internal(Reason.INCOMPLETE_STREAM, "m"), 3),
        (Internal(Reason.BUG, "m"), 1),
        (BadNumbers(Reason.NON_FINITE_LOGITS, "m"), 1),
    ],
    ids=lambda value: f"{type(value).__name__} {value.reason}" if isinstance(value, Problem) else None,
)
def test_a_problem_has_its_exit_code(problem: Problem, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise problem

    monkeypatch.setattr("dualtrace.cli.asking.open_target", refuse)
    refused("describe", "fake:", code=code)


def fail_with_a_bug(*_: object) -> None:
    raise ZeroDivisionError("planted")


def test_a_bug_of_ours_is_one_line_and_the_way_to_see_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualtrace.cli.asking.open_target", fail_with_a_bug)
    assert "--debug" in refused("describe", "fake:", code=1)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualtrace.cli.asking.open_target", fail_with_a_bug)
    assert "Traceback" in run("describe", "fake:", "--debug").stderr


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dualtrace.cli.asking.open_target", interrupt)
    assert "interrupted" in refused("describe", "fake:", code=130)


def test_a_tiny_model_is_written_where_asked(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    assert run("model", "tiny", folder, "--family", "gpt2", "--seed", "3").stdout.strip() == str(folder)
    assert run_json("describe", f"reference:{folder}")["provenance"]["family"] == "gpt2"


def test_a_tiny_model_does_not_replace_a_folder_unasked(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    assert "not empty" in refused("model", "tiny", tmp_path)


def test_a_tiny_model_that_cannot_be_is_refused(tmp_path: Path) -> None:
    assert "mha" in refused("model", "tiny", tmp_path / "made", "--family", "gpt2", "--attention", "gqa")


def test_a_fetch_prints_the_folder_alone_and_talks_on_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(_cache: None, progress: Any, *, verify: bool) -> Path:
        progress("downloading", 0.0)
        progress("downloading", 0.2)
        progress(f"checking {verify}", 0.9)
        return Path("somewhere")

    monkeypatch.setattr("dualtrace.models.fetch.fetch_smollm2", fetch)
    result = run("model", "fetch", "smollm2", "--verify")
    assert result.stdout == "somewhere\n"
    assert [line.split("s  ")[1] for line in result.stderr.splitlines()] == ["downloading", "checking True"]
