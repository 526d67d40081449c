"""Every metric of a process, declared here and nowhere else.

It knows the names, units and meanings of what is counted. It must not know who counts or why: a `Metrics` is made once
per process and passed down, so nothing happens at import and two sidecars in one test never share a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Thread
from types import TracebackType
from typing import Self
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from dualtrace.problems import Reason, Unavailable

DROP_REASONS = ("cancelled", "deadline")
VERDICTS = ("PASS", "FAIL", "INCOMPARABLE", "ERROR")
JOB_ENDS = ("DONE", "FAILED", "CANCELLED")

CALL_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
STEP_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
PREPARE_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BATCH_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)


class ProcessMetrics:
    """What every process of ours counts: its calls, whether it is ready, what runs in it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._declare_calls(self.registry)
        self._declare_process(self.registry)

    def _declare_calls(self, registry: CollectorRegistry) -> None:
        self.calls = Counter(
            "dualtrace_calls",
            "Calls that ended, by method and gRPC status name.",
            ("method", "code"),
            registry=registry,
        )
        self.call_seconds = Histogram(
            "dualtrace_call_seconds", "From a call's arrival to its last message.", ("method",),
            buckets=CALL_SECONDS, registry=registry,
        )  # fmt: skip

    def _declare_process(self, registry: CollectorRegistry) -> None:
        self.ready = Gauge("dualtrace_ready", "1 while calls are accepted, else 0.", registry=registry)
        self.build = Info("dualtrace_build", "What runs here: version, framework, dtype.", registry=registry)

    def describe_build(self, *, version: str, framework: str, dtype: str) -> None:
        """Say once what runs in this process."""
        self.build.info({"version": version, "framework": framework, "dtype": dtype})


class Metrics(ProcessMetrics):
    """The metrics of one sidecar, on a registry of their own."""

    def __init__(self) -> None:
        super().__init__()
        self._declare_queue(self.registry)
        self._declare_engine(self.registry)

    def _declare_queue(self, registry: CollectorRegistry) -> None:
        self.queue_seconds = Histogram(
            "dualtrace_queue_seconds",
            "From a call's arrival to its first step.",
            buckets=CALL_SECONDS,
            registry=registry,
        )
        self.waiting_calls = Gauge("dualtrace_waiting_calls", "Calls in the queue right now.", registry=registry)
        self.slow_readers = Counter(
            "dualtrace_slow_streams_aborted", "Streams ended because their reader was too slow.", registry=registry
        )

    def _declare_engine(self, registry: CollectorRegistry) -> None:
        self.computed_tokens = Counter("dualtrace_computed_tokens", "Tokens the model really ran.", registry=registry)
        self.shared_tokens = Counter(
            "dualtrace_shared_tokens",
            "Tokens that were asked and not run, for a shared prefix held them.",
            registry=registry,
        )
        self.padded_tokens = Counter(
            "dualtrace_padded_tokens", "Token places that ran empty, to reach a bucket's size.", registry=registry
        )
        self.scored_tokens = Counter("dualtrace_scored_tokens", "Tokens whose logprob was answered.", registry=registry)
        self.batch_rows = Histogram(
            "dualtrace_batch_rows", "Segments in one batch.", buckets=BATCH_ROWS, registry=registry
        )
        self.batch_tokens = Histogram(
            "dualtrace_batch_tokens", "Tokens to run in one batch.", buckets=BATCH_TOKENS, registry=registry
        )
        self.step_seconds = Histogram(
            "dualtrace_engine_step_seconds", "One step of the engine.", buckets=STEP_SECONDS, registry=registry
        )
        self.dropped_segments = Counter(
            "dualtrace_dropped_segments", "Segments nobody wanted any more, by why.", ("reason",), registry=registry
        )
        for reason in DROP_REASONS:  # a rate over a series that is not there yet would miss its first event
            self.dropped_segments.labels(reason)
        self.prepare_seconds = Histogram(
            "dualtrace_prepare_seconds", "Getting ready for one shape (compiling).",
            buckets=PREPARE_SECONDS, registry=registry,
        )  # fmt: skip


class CoordinatorMetrics(ProcessMetrics):
    """The metrics of one coordinator, on a registry of their own."""

    def __init__(self) -> None:
        super().__init__()
        self._declare_comparisons(self.registry)
        self._declare_jobs(self.registry)

    def _declare_comparisons(self, registry: CollectorRegistry) -> None:
        self.comparisons = Counter(
            "dualtrace_comparisons", "Comparisons that ended, by verdict.", ("verdict",), registry=registry
        )
        for verdict in VERDICTS:
            self.comparisons.labels(verdict)
        self.comparison_seconds = Histogram(
            "dualtrace_comparison_seconds", "From the question to the stored report.",
            buckets=CALL_SECONDS, registry=registry,
        )  # fmt: skip
        self.running_comparisons = Gauge(
            "dualtrace_running_comparisons", "Comparisons that run right now.", registry=registry
        )
        self.refused_comparisons = Counter(
            "dualtrace_refused_comparisons", "Comparisons refused because too many ran.", registry=registry
        )
        self.failed_sides = Counter(
            "dualtrace_failed_sides", "Sides of comparisons that gave up.", ("backend",), registry=registry
        )
        self.backend_replicas = Gauge(
            "dualtrace_backend_replicas", "Replicas that a backend has.", ("backend",), registry=registry
        )
        self.backend_replicas_serving = Gauge(
            "dualtrace_backend_replicas_serving",
            "Replicas that serve; 0 where they differ in provenance.",
            ("backend",),
            registry=registry,
        )

    def _declare_jobs(self, registry: CollectorRegistry) -> None:
        self.jobs = Counter("dualtrace_jobs", "Jobs that ended, by state.", ("state",), registry=registry)
        for state in JOB_ENDS:
            self.jobs.labels(state)
        self.running_jobs = Gauge("dualtrace_running_jobs", "Jobs that run right now.", registry=registry)
        self.waiting_jobs = Gauge("dualtrace_waiting_jobs", "Jobs that wait for a worker.", registry=registry)
        self.stored_runs = Counter("dualtrace_stored_runs", "Runs that were stored.", registry=registry)


@dataclass(frozen=True)
class MetricsServer:
    """The HTTP server of the metrics, on a thread of its own until `close`."""

    host: str
    port: int  # the port really taken
    _server: WSGIServer
    _thread: Thread

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve_metrics(metrics: ProcessMetrics, host: str, port: int) -> MetricsServer:
    """Serve the metrics in Prometheus' text form; port 0 takes any free one."""
    try:
        server, thread = start_http_server(port, addr=host, registry=metrics.registry)
    except OSError as error:
        message = (
            f"the metrics cannot listen on {host}:{port} ({error}); choose another metrics_port, or 0 for any free one"
        )
        raise Unavailable(Reason.UNREACHABLE, message, field="metrics_port") from error
    return MetricsServer(host, server.server_port, server, thread)
