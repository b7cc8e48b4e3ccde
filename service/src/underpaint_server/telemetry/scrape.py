"""What is read at the moment of a scrape, and from whom."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from underpaint_server import __version__
from underpaint_server.jobs import Priority


class EngineView(Protocol):
    """What is read from the engine's front at scrape, from another thread: plain attribute reads that never block."""

    @property
    def num_running(self) -> int:
        """Jobs that take part in passes."""

    @property
    def queue_capacity(self) -> int:
        """Jobs that may wait."""

    @property
    def backlog_s(self) -> float:
        """Estimated seconds of work waiting and running."""

    @property
    def last_pass_at(self) -> float | None:
        """Unix time of the last forward pass; None before the first."""

    def num_waiting(self, priority: Priority) -> int:
        """Jobs that wait at that priority."""


class StoreView(Protocol):
    """What is read from the inversion store at scrape."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all entries."""

    @property
    def entries(self) -> int:
        """Number of entries."""


class OperationsView(Protocol):
    """What is read of operations at scrape."""

    @property
    def running(self) -> int:
        """Those that run on this server."""

    @property
    def waiting(self) -> int:
        """Those in the store that no server runs, as last seen."""

    @property
    def done(self) -> int:
        """Those in the store that have ended and are remembered, as last seen."""


class AtScrape(Collector):
    """Gauges computed when they are asked for, on the thread that serves the scrape."""

    def __init__(self) -> None:
        self.engine: EngineView | None = None
        self.store: StoreView | None = None
        self.operations: OperationsView | None = None

    def collect(self) -> Iterator[Metric]:
        """The build, and whatever is watched, as of now."""
        yield _build_info()
        if self.engine is not None:
            yield from _engine_gauges(self.engine)
        if self.store is not None:
            yield from _store_gauges(self.store)
        if self.operations is not None:
            yield _operations_gauge(self.operations)


def _engine_gauges(engine: EngineView) -> Iterator[Metric]:
    yield _gauge("underpaint_num_requests_running", "Jobs that take part in passes.", engine.num_running)
    waiting = GaugeMetricFamily("underpaint_num_requests_waiting", "Jobs in the queue.", labels=("priority",))
    for priority in Priority:
        waiting.add_metric((priority.name.lower(),), engine.num_waiting(priority))
    yield waiting
    yield _gauge("underpaint_queue_capacity", "Jobs that may wait.", engine.queue_capacity)
    yield _gauge(
        "underpaint_estimated_backlog_seconds", "Estimated time of the work waiting and running.", engine.backlog_s
    )
    last = engine.last_pass_at
    if last is not None:
        yield _gauge("underpaint_engine_last_step_timestamp_seconds", "Unix time of the last pass.", last)


def _store_gauges(store: StoreView) -> Iterator[Metric]:
    yield _gauge("underpaint_inversion_store_bytes", "Bytes of stored inversions.", store.total_bytes)
    yield _gauge("underpaint_inversion_store_entries", "Stored inversions.", store.entries)


def _operations_gauge(operations: OperationsView) -> Metric:
    gauge = GaugeMetricFamily(
        "underpaint_operations", "Operations that run here, that nobody runs, and that have ended.", labels=("state",)
    )
    for state in ("running", "waiting", "done"):
        gauge.add_metric((state,), getattr(operations, state))
    return gauge


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _build_info() -> Metric:
    info = GaugeMetricFamily("underpaint_build_info", "What runs here.", labels=("version", "python", "torch"))
    info.add_metric((__version__, platform.python_version(), _torch_version()), 1)
    return info


def _torch_version() -> str:
    # From the package's metadata: the front process must not import torch.
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""
