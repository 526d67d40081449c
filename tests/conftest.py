"""The tests' house rules: which engines, which tests are skipped and why, and what a failure shows.

It knows the engines by name. It must not know how any of them is built or what a test asks.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.processes import Processes

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engines",
        default="reference,fake,torch,jax",
        help="engines the contract suite runs with, a comma list; one that is named and missing fails",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name in THREAD_VARIABLES:  # before numpy is imported: it reads them once
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Where a shell runs us in its background, we and all we start would ignore Ctrl-C, which tests send.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The machine is shared: how long one example took says nothing about the code.
    hypothesis.settings.register_profile("house", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("house")
    # Two sessions on one machine clean away old temporary folders at the same time.
    config.addinivalue_line("filterwarnings", r"ignore:\(rm_rf\) error removing:pytest.PytestWarning")
    config.addinivalue_line("markers", "engines_but(*names): runs with all engines of --engines but these")
    if not list_engines(config):
        raise pytest.UsageError("--engines names none; name one, or several with commas between")


def list_engines(config: pytest.Config) -> list[str]:
    return [name.strip() for name in config.getoption("--engines").split(",") if name.strip()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test is not made for an engine that it says nothing about, rather than made and skipped."""
    if "engine_name" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("engines_but")
        left_out = () if marker is None else marker.args
        names = [name for name in list_engines(metafunc.config) if name not in left_out]
        metafunc.parametrize("engine_name", names, indirect=True)


@pytest.fixture
def engine_name(request: pytest.FixtureRequest) -> str:
    """The name of the engine under test. It fails, and never skips, when that engine is not there."""
    from dualtrace.engine_registry import find_engine  # numpy comes with it: not before the threads are set
    from dualtrace.problems import Problem

    name: str = request.param
    try:
        find_engine(name)
    except Problem as problem:
        pytest.fail(f"engine {name!r} was named in --engines: {problem.detail.message}")
    return name


# Compiling dominates there: in `make test` JAX meets one Llama and one GPT-2, in `make test-all` every model.
SLOW_PAIRS = [("jax", "llama mha"), ("jax", "llama mqa")]


@pytest.hookimpl(tryfirst=True)  # before -m "not slow" looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if (parameters.get("engine_name"), parameters.get("model")) in SLOW_PAIRS:
            item.add_marker("slow")
    if importlib.util.find_spec("torch") is None:
        for item in items:
            if item.get_closest_marker("torch") is not None:
                item.add_marker(pytest.mark.skip(reason="torch is not installed"))


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Starts processes that are ended with the test, however it ends."""
    with Processes(tmp_path) as started:
        yield started


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the processes of a failed test said."""
    report = yield
    started = getattr(item, "funcargs", {}).get("processes")
    if report.failed and isinstance(started, Processes):
        report.sections.extend(started.tell())
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count what was skipped, by reason, so that a green run cannot hide what it left out."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"skipped: {count} x {reason}", yellow=True)
    if not reasons:
        terminalreporter.write_line("skipped: none")
