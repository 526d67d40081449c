"""Metrics: names, help, and a server that can be shut down."""

import re
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dualtrace.metrics import DROP_REASONS, Metrics, MetricsServer, serve_metrics
from dualtrace.problems import Unavailable


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    metrics = Metrics()
    metrics.ready.set(1)
    with serve_metrics(metrics, "127.0.0.1", 0) as running:
        yield running


def read_families(registry: CollectorRegistry) -> dict[str, str]:
    """Name -> help of everything declared, without the creation times that the library adds by itself."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {family.name: family.documentation for family in families if not family.name.endswith("_created")}


def test_every_metric_has_our_prefix() -> None:
    assert all(name.startswith("dualtrace_") for name in read_families(Metrics().registry))


def test_every_metric_has_help() -> None:
    assert all(read_families(Metrics().registry).values())


def test_every_time_is_in_seconds() -> None:
    names = read_families(Metrics().registry)
    assert not [name for name in names if re.search(r"milli|micro|_ms$|minutes|latency", name)]


def test_two_processes_worth_of_metrics_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.scored_tokens.inc(5)
    assert other.registry.get_sample_value("dualtrace_scored_tokens_total") == 0.0


@pytest.mark.parametrize("reason", DROP_REASONS)
def test_a_reason_to_drop_is_there_before_the_first_drop(reason: str) -> None:
    sample = Metrics().registry.get_sample_value("dualtrace_dropped_segments_total", {"reason": reason})
    assert sample == 0.0


def test_a_call_is_counted_by_method_and_code() -> None:
    metrics = Metrics()
    metrics.calls.labels(method="Score", code="OK").inc()
    assert metrics.registry.get_sample_value("dualtrace_calls_total", {"method": "Score", "code": "OK"}) == 1.0


def test_the_build_is_described_by_its_labels() -> None:
    metrics = Metrics()
    metrics.describe_build(version="1", framework="reference", dtype="float64")
    labels = {"version": "1", "framework": "reference", "dtype": "float64"}
    assert metrics.registry.get_sample_value("dualtrace_build_info", labels) == 1.0


def test_the_server_answers_with_the_metrics(server: MetricsServer) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as answer:
        assert b"\ndualtrace_ready 1.0\n" in answer.read()


def test_a_port_that_is_taken_is_a_problem_that_names_it(server: MetricsServer) -> None:
    with pytest.raises(Unavailable, match=str(server.port)):
        serve_metrics(Metrics(), "127.0.0.1", server.port)


def test_a_closed_server_gives_its_port_back() -> None:
    first = serve_metrics(Metrics(), "127.0.0.1", 0)
    first.close()
    serve_metrics(Metrics(), "127.0.0.1", first.port).close()
