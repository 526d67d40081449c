"""The command line against a coordinator behind TLS and a token: what it asks, and the commands that it prints."""

import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from click.testing import Result

from tests.support.coordinated import COORDINATING, address_of, case_text, run, start_sidecar, write_case_file
from tests.support.processes import Process, Processes

TOKEN = "open-sesame"
TEXT = ("--text", "it's now here; rm $HOME")
SPECS = {"plain": "", "twin": "", "bent": "plant_at=3,plant=3", "other": "seed=1", "stalled": "step=1,step_ms=30000"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, server.pem and .key (localhost), and the token's file."""
    folder = tmp_path_factory.mktemp("keys")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(str(folder / "server.key"))
    issued.cert_chain_pems[0].write_to_path(str(folder / "server.pem"))
    (folder / "token").write_text(f"{TOKEN}\n")
    return folder


@pytest.fixture(scope="module")
def address(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("house")
    with Processes(folder) as processes:
        sidecars = {name: start_sidecar(processes, spec, name) for name, spec in SPECS.items()}
        yield f"grpcs://{start_coordinator(processes, sidecars, keys, folder / 'data')}"
        sidecars["stalled"].popen.kill()  # it would be waited for


def start_coordinator(processes: Processes, sidecars: dict[str, Process], keys: Path, data: Path) -> str:
    command = [sys.executable, "-m", "coordinator", "--host", "localhost", "--port", "0", "--http-port", "0"]
    command += ["--data", str(data), "--token-file", str(keys / "token")]
    command += ["--tls-certificate", str(keys / "server.pem"), "--tls-key", str(keys / "server.key")]
    for name, sidecar in sidecars.items():
        command += ["--backend", f"{name}={address_of(sidecar)}"]
    started = processes.start(command, name="coordinator", ready=COORDINATING)
    assert started.ready is not None
    return started.ready[1]


@pytest.fixture
def flags(address: str, keys: Path) -> list[str]:
    return ["--coordinator", address, "--token-file", str(keys / "token"), "--ca-file", str(keys / "ca.pem")]


@pytest.fixture
def environment(address: str, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without a flag."""
    monkeypatch.setenv("DUALTRACE_COORDINATOR", address)
    monkeypatch.setenv("DUALTRACE_CLIENT_TOKEN_FILE", str(keys / "token"))
    monkeypatch.setenv("DUALTRACE_CLIENT_CA_FILE", str(keys / "ca.pem"))


def repeat(first: Result) -> Result:
    """Run what the output says to run."""
    lines = first.stdout.rstrip().splitlines()
    told = [line.partition("reproduce: ")[2] for line in lines if "reproduce: " in line]
    words = shlex.split(told[-1] if told else lines[lines.index("reproduce with:") + 1])
    return run(*words[1:])


def verdict_of(result: Result) -> str:
    return next(line for line in result.stdout.splitlines() if line.startswith("verdict: "))


@pytest.mark.usefixtures("environment")
def test_the_environment_says_where_the_coordinator_is_and_what_lets_us_in(tmp_path: Path) -> None:
    assert run("backend", "list").exit_code == 0
    assert run("run", "start", "backend:plain", *TEXT).exit_code == 0
    assert run("compare", "backend:plain", "backend:twin", *TEXT).exit_code == 0
    file = write_case_file(tmp_path, case_text("good", "backend:plain", "backend:twin"))
    assert run("case", "run", file).exit_code == 0


@pytest.mark.usefixtures("environment")
def test_a_stored_run_is_fetched_over_tls_to_be_compared_with_a_side_of_ours() -> None:
    kept = json.loads(run("run", "start", "backend:plain", *TEXT, "--json").stdout)
    assert run("compare", f"run:{kept['run_id']}", "fake:").exit_code == 0


@pytest.mark.usefixtures("environment")
def test_a_prompt_from_standard_input_is_the_one_that_is_asked() -> None:
    words = ("--prompt-file", "-", "--completion", " here", "--json")
    kept = json.loads(run("run", "start", "backend:plain", *words, stdin="what is piped in").stdout)
    record = json.loads(run("run", "show", kept["run_id"], "--json").stdout)
    assert record["run"]["question"]["items"][0]["prompt"]["text"] == "what is piped in"


def test_flags_say_the_same(flags: list[str]) -> None:
    assert run("compare", "backend:plain", "backend:twin", *TEXT, *flags).exit_code == 0
    assert run("backend", "list", *flags).exit_code == 0


def test_without_the_token_nobody_is_let_in(flags: list[str]) -> None:
    result = run("compare", "backend:plain", "backend:twin", *TEXT, *flags[:2], *flags[4:])
    assert (result.exit_code, "UNAUTHENTICATED" in result.stderr) == (2, True)


def test_certificates_without_tls_are_refused_and_not_left_out(flags: list[str]) -> None:
    plain = [flags[0], flags[1].removeprefix("grpcs://"), *flags[2:]]
    result = run("compare", "backend:plain", "backend:twin", *TEXT, *plain)
    assert (result.exit_code, "grpcs://" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    "question",
    [TEXT, ("--query", "Is it ", "--item", "so", "--label", "a", "--label", "b"), ("--next", "hello")],
    ids=["text", "label texts", "next"],
)
def test_a_comparison_by_the_coordinator_ends_with_the_command_that_repeats_it(
    flags: list[str], question: tuple[str, ...]
) -> None:
    first = run("compare", "backend:plain", "backend:other", *question, "--abs-epsilon", "0", *flags)
    again = repeat(first)
    assert (again.exit_code, verdict_of(again)) == (first.exit_code, verdict_of(first)) == (1, "verdict: FAIL")


def test_a_kept_comparison_is_shown_with_the_command_that_repeats_it(flags: list[str]) -> None:
    run("compare", "backend:plain", "backend:bent", *TEXT, "--max-mismatches", "0", *flags)
    (kept, *_others) = json.loads(run("comparison", "list", "--json", *flags).stdout)["comparisons"]
    shown = run("comparison", "show", kept["comparison_id"], *flags)
    again = repeat(shown)
    assert (shown.exit_code, verdict_of(shown), again.exit_code) == (0, "verdict: FAIL", 1)


def test_two_runs_compared_end_with_the_command_that_repeats_it(flags: list[str]) -> None:
    ids = [
        json.loads(run("run", "start", f"backend:{name}", *TEXT, "--json", *flags).stdout)["run_id"]
        for name in ("plain", "bent")
    ]
    first = run("run", "compare", *ids, *flags)
    assert (verdict_of(first), verdict_of(repeat(first))) == ("verdict: FAIL", "verdict: FAIL")
    replayed = run("run", "replay", ids[0], "backend:bent", *flags)
    assert (verdict_of(replayed), verdict_of(repeat(replayed))) == ("verdict: FAIL", "verdict: FAIL")


def test_a_case_made_of_options_is_kept_and_repeated(flags: list[str]) -> None:
    question = ("--query", "Is it ", "--item", "so", "--label", "a", "--label", "b", "--abs-epsilon", "1e-9")
    made = run("case", "create", "labels", "backend:plain", "backend:other", *question, "--tag", "made", *flags)
    assert made.exit_code == 0, made.output
    first = run("case", "run", "--tag", "made", *flags)
    assert first.exit_code == 1, first.output
    assert repeat(first).exit_code == 1
    (kept, *_others) = json.loads(run("comparison", "list", "--case", "labels", "--json", *flags).stdout)["comparisons"]
    assert repeat(run("comparison", "show", kept["comparison_id"], *flags)).exit_code == 1


def test_a_tolerance_of_ones_own_name_goes_into_the_store_and_out_again(flags: list[str], tmp_path: Path) -> None:
    own = "tolerance: {abs: 0.5, rel: 0, name: ours, source: measured by us}"
    text = case_text("own", "backend:plain", "backend:bent", tags="own").replace("tolerance: {abs: 1e-9, rel: 0}", own)
    file = write_case_file(tmp_path, text)
    dids = [json.loads(run("case", "import", file, "--json", *flags).stdout)["cases"][0]["did"] for _ in range(2)]
    assert dids == ["created", "unchanged"]


def test_a_label_that_is_several_tokens_is_refused_with_them(flags: list[str]) -> None:
    asked = ("--query", "q", "--item", "i", "--label", "a zebra")
    result = run("run", "start", "backend:plain", *asked, *flags)
    assert (result.exit_code, "tokens" in result.stderr, "--label" in result.stderr) == (2, True, True)


@pytest.mark.parametrize(
    "command",
    [("compare", "backend:plain", "backend:stalled", *TEXT), ("run", "replay", "{run}", "backend:stalled")],
    ids=["compare", "run replay"],
)
def test_a_side_that_stalls_is_named_within_the_time_and_the_other_one_is_kept(
    flags: list[str], command: tuple[str, ...]
) -> None:
    kept = json.loads(run("run", "start", "backend:plain", *TEXT, "--json", *flags).stdout)
    begun = time.monotonic()
    result = run(*(part.format(run=kept["run_id"]) for part in command), "--timeout", "2", *flags)
    assert time.monotonic() - begun < 2.5
    assert (result.exit_code, verdict_of(result)) == (3, "verdict: ERROR")
    assert "the right side (backend:stalled) failed: DEADLINE" in " ".join(result.stdout.split())
    assert any("-" in line and "unavailable" in line for line in result.stdout.splitlines())  # the left one's numbers


def test_a_call_of_a_run_ends_with_its_own_time(flags: list[str]) -> None:
    begun = time.monotonic()
    result = run("run", "start", "backend:stalled", *TEXT, "--call-timeout", "1", *flags)
    assert (result.exit_code, "DEADLINE" in result.output) == (3, True)
    assert time.monotonic() - begun < 5


def test_token_debug_and_benchmarks_are_shown_whole(flags: list[str]) -> None:
    asked = ("--query", "Is it ", "--item", "so", "--labels", "5,6")
    debug = run("run", "start", "backend:plain", *asked, "--token-debug", *flags).stdout
    assert "The items' own tokens" in debug
    assert "tokens scored  2 of" in debug
    timed = run("run", "start", "backend:plain", *TEXT, "--mode", "benchmark", "--repeats", "7", *flags).stdout
    assert "7, 1 at a time, after 3 to warm up" in timed
    assert float(timed.split("p95 ms")[1].split()[0]) > 0
