"""Gauges that are read from their owners at each scrape, and what the owners provide."""

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from underpaint_server import __version__
from underpaint_server.jobs import Priority


class EngineView(Protocol):
    """The dispatcher's current values. Read from the thread that serves the scrape, so reading must not block."""

    @property
    def num_running(self) -> int:
        """Jobs in the engine."""

    @property
    def queue_capacity(self) -> int:
        """Most jobs of each priority that may wait in the queue."""

    @property
    def backlog_s(self) -> float:
        """Estimated seconds of device time for all waiting and running jobs."""

    @property
    def last_pass_at(self) -> float | None:
        """Unix time of the last network pass; None before the first."""

    @property
    def models_ready(self) -> Mapping[str, bool]:
        """Id of each configured model -> whether jobs of it are run now."""

    @property
    def max_batch_sizes(self) -> Mapping[tuple[str, str, str], int]:
        """(model, kind of row, size of its image: own, smaller or larger) -> most rows of a pass."""

    def num_waiting(self, priority: Priority) -> int:
        """Jobs of ``priority`` in the queue."""


class StoreView(Protocol):
    """Current values of the store of inversions, or of that of directions."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all that is stored."""

    @property
    def entries(self) -> int:
        """Number of stored inversions or directions."""


class OperationsView(Protocol):
    """Current numbers of operations."""

    @property
    def running(self) -> int:
        """Operations that run on this server."""

    @property
    def waiting(self) -> int:
        """Unfinished operations that no server runs, at the last scan."""

    @property
    def done(self) -> int:
        """Operations that have ended and are not removed yet, at the last scan."""

    @property
    def rows(self) -> int:
        """Network rows of all unfinished operations, at the last scan."""


class CallsView(Protocol):
    """Current numbers of calls."""

    @property
    def calls(self) -> int:
        """Calls in progress."""

    @property
    def slow_requests(self) -> int:
        """Calls whose request takes long to arrive."""

    @property
    def held_bytes(self) -> int:
        """Bytes of the requests of calls in progress."""


class LogView(Protocol):
    """The writer of log lines."""

    @property
    def dropped(self) -> int:
        """Lines dropped so far."""


class AtScrape(Collector):
    """Computes the gauges at each scrape, on the thread that serves it; None for an owner leaves its gauges out."""

    def __init__(self) -> None:
        self.engine: EngineView | None = None
        self.store: StoreView | None = None
        self.directions: StoreView | None = None
        self.operations: OperationsView | None = None
        self.log: LogView | None = None
        self.calls: CallsView | None = None

    def collect(self) -> Iterator[Metric]:
        """The build information and the gauges of all owners that are set."""
        yield _build_info()
        if self.engine is not None:
            yield from _engine_gauges(self.engine)
        if self.store is not None:
            yield from _store_gauges(self.store, "inversion")
        if self.directions is not None:
            yield from _store_gauges(self.directions, "direction")
        if self.operations is not None:
            yield _operations_gauge(self.operations)
            yield _gauge("underpaint_operations_rows", "Network rows of unfinished operations.", self.operations.rows)
        if self.log is not None:
            text = "Log lines of the front process that could not be written."
            yield CounterMetricFamily("underpaint_log_lines_dropped_total", text, value=self.log.dropped)
        if self.calls is not None:
            yield _gauge("underpaint_request_bytes_held", "Bytes of requests in progress.", self.calls.held_bytes)
            yield _gauge("underpaint_calls_in_progress", "Calls in progress.", self.calls.calls)
            yield _gauge(
                "underpaint_slow_requests", "Requests that take over a second to arrive.", self.calls.slow_requests
            )


def _engine_gauges(engine: EngineView) -> Iterator[Metric]:
    yield _gauge("underpaint_num_requests_running", "Jobs in the engine.", engine.num_running)
    waiting = GaugeMetricFamily("underpaint_num_requests_waiting", "Jobs in the queue.", labels=("priority",))
    for priority in Priority:
        waiting.add_metric((priority.name.lower(),), engine.num_waiting(priority))
    yield waiting
    yield _gauge("underpaint_queue_capacity", "Most jobs of each priority that may wait.", engine.queue_capacity)
    yield _gauge(
        "underpaint_estimated_backlog_seconds", "Estimated time of waiting and running jobs.", engine.backlog_s
    )
    ready = GaugeMetricFamily(
        "underpaint_model_ready", "Whether a configured model is served now: 1 or 0.", labels=("model",)
    )
    for model, is_ready in engine.models_ready.items():
        ready.add_metric((model,), is_ready)
    yield ready
    sizes = GaugeMetricFamily(
        "underpaint_max_batch_size",
        "Most rows of a pass, as learned, where that number changes no bits; by size of the image.",
        labels=("model", "kind", "size"),
    )
    for labels, rows in engine.max_batch_sizes.items():
        sizes.add_metric(labels, rows)
    yield sizes
    last = engine.last_pass_at
    if last is not None:
        yield _gauge("underpaint_engine_last_step_timestamp_seconds", "Unix time of the last network pass.", last)


def _store_gauges(store: StoreView, kind: str) -> Iterator[Metric]:
    yield _gauge(f"underpaint_{kind}_store_bytes", f"Bytes of stored {kind}s.", store.total_bytes)
    yield _gauge(f"underpaint_{kind}_store_entries", f"Stored {kind}s.", store.entries)


def _operations_gauge(operations: OperationsView) -> Metric:
    gauge = GaugeMetricFamily(
        "underpaint_operations", "Operations: run by this server, run by none, ended.", labels=("state",)
    )
    for state in ("running", "waiting", "done"):
        gauge.add_metric((state,), getattr(operations, state))
    return gauge


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _build_info() -> Metric:
    info = GaugeMetricFamily("underpaint_build_info", "Versions.", labels=("version", "python", "torch"))
    info.add_metric((__version__, platform.python_version(), _torch_version()), 1)
    return info


def _torch_version() -> str:
    # From the package metadata, because the front process must not import torch.
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""
