"""All metrics that the server exports, and the events that change them.

Metric names are defined only here and in ``scrape``. Other code calls an ``on_...`` method of :class:`Metrics` when
something happens. Current values (queue, backlog, store) are read from their owners at each scrape instead of being
counted up and down, so a missed event cannot leave a gauge wrong. Every label has a closed set of values: text that a
caller may choose, such as a model's name, becomes ``""`` unless it is known.
"""

from collections.abc import Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client import (
    values as library_values,
)

from underpaint_server.jobs import Exactness, ModelInfo, Phase, Priority
from underpaint_server.methods import JOB_NAMES
from underpaint_server.telemetry.scrape import AtScrape, CallsView, EngineView, LogView, OperationsView, StoreView

# This process alone has its metrics. Where the environment of another program sets PROMETHEUS_MULTIPROC_DIR, the
# library would keep them in files of that directory: the start fails if it is missing, and counters outlive a restart.
library_values.ValueClass = library_values.MutexValue

_LATENCY_S = (0.1, 0.25, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 7.5, 10, 15, 20, 30, 40, 60, 120, 240, 480)
_QUEUE_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_STEP_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_CANCEL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LOAD_S = (0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_RPC_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 240, 480)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_ROWS_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
_BYTES = tuple(1024 * 4**power for power in range(9))
_PIXELS = tuple(65536 * 2**power for power in range(9))

_EXACTNESS: Mapping[Exactness, int] = {
    Exactness.ANY_SIZE: 1,
    Exactness.ROW_BY_ROW: 1,
    Exactness.FIXED_SIZE: 0,
    Exactness.INEXACT: -1,
}
"""Values of ``underpaint_exact_batching``."""


class Metrics:
    """All metrics of one server process.

    Without a ``registry``, makes one that also has the library's process, garbage-collector and platform collectors.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        if registry is None:
            for stock in (ProcessCollector, PlatformCollector, GCCollector):
                stock(registry=self.registry)
        # Drops the _created series that the library would add for every other series; no rule or dashboard uses them.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no annotation here
        self._at_scrape = AtScrape()
        self._models: set[str] = set()
        self._define_requests()
        self._define_jobs()
        self._define_engine()
        self._define_store()
        self._start_at_zero()
        self.registry.register(self._at_scrape)

    # --- calls --------------------------------------------------------------------------------------------------

    def on_request_started(self, *, service: str, rpc: str, grpc_type: str) -> None:
        """A call arrived. ``service`` as ``underpaint.v1.EditService``, ``grpc_type`` as ``unary``, ``server_stream``,
        ``client_stream`` or ``bidi_stream``."""
        self._started.labels(grpc_type, service, rpc).inc()

    def on_request_handled(
        self,
        *,
        service: str,
        rpc: str,
        grpc_type: str,
        code: str,
        seconds: float,
        reason: str = "",
        method: str = "",
        model: str = "",
    ) -> None:
        """A call ended after ``seconds``.

        ``code`` is its gRPC code (``OK``, ``NOT_FOUND`` ...), ``reason`` the reason of its error, ``""`` for none.
        ``method`` and ``model`` (an id) are ``""`` for calls that have none; unknown ones become ``""``.
        """
        method, model = _known(method, JOB_NAMES), _known(model, self._models)
        self._handled.labels(grpc_type, service, rpc, code).inc()
        self._handling.labels(grpc_type, service, rpc).observe(seconds)
        self._requests.labels(rpc, method, code, reason).inc()
        if method:
            self._e2e.labels(rpc, method, model).observe(seconds)

    def on_first_event(self, *, method: str, seconds: float) -> None:
        """A stream sent its first message ``seconds`` after the call arrived."""
        self._first_event.labels(_known(method, JOB_NAMES)).observe(seconds)

    def on_request_message(self, *, rpc: str, bytes: int) -> None:
        """A message was received; ``bytes`` is its serialized size."""
        self._request_bytes.labels(rpc).observe(bytes)

    def on_response_message(self, *, rpc: str, bytes: int) -> None:
        """A message was sent; ``bytes`` is its serialized size."""
        self._response_bytes.labels(rpc).observe(bytes)

    def on_image(self, *, pixels: int) -> None:
        """An image was received; ``pixels`` is width times height from its header."""
        self._image_pixels.observe(pixels)

    def on_replay(self, *, result: str) -> None:
        """A request repeated a request id: it ``joined`` the call that runs, or its response was ``replayed``; from the
        store, where another server or an earlier process had left it, it was ``stored``."""
        self._replays.labels(result).inc()

    # --- jobs ---------------------------------------------------------------------------------------------------

    def on_queue_time(self, *, method: str, priority: Priority, seconds: float) -> None:
        """A job had its first pass ``seconds`` after its submission."""
        self._queue_time.labels(method, priority.name.lower()).observe(seconds)

    def on_phase(self, *, phase: Phase, method: str, seconds: float) -> None:
        """A job spent ``seconds`` in one of its phases."""
        self._phase.labels(phase.value, method).observe(seconds)

    def on_cancelled(self, *, method: str, stage: str) -> None:
        """A job was cancelled; ``stage`` is ``queued``, ``running`` or ``finished``."""
        self._cancellations.labels(method, stage).inc()

    def on_deadline_missed(self, *, method: str, stage: str) -> None:
        """A job was refused ``at_admission`` for its deadline, or its deadline passed while ``queued`` or ``running``.

        ``stage`` is one of these three.
        """
        self._deadline_misses.labels(method, stage).inc()

    # --- engine -------------------------------------------------------------------------------------------------

    def on_pass(
        self,
        *,
        model: str,
        kind: str,
        is_network: bool,
        rows_by_method: Mapping[str, int],
        padding: int,
        duration_s: float,
    ) -> None:
        """A pass of rows of one ``kind``, such as ``denoise`` or ``decode``, ended after ``duration_s``.

        Only passes of network rows count as denoising steps. ``padding`` rows of the pass belong to no job.
        """
        self._passes.labels(model, kind).observe(duration_s)
        if not is_network:
            return
        rows = sum(rows_by_method.values())
        for method, count in rows_by_method.items():
            self._network_rows.labels(model, method).inc(count)
        self._padding_rows.labels(model).inc(padding)
        self._batch_rows.labels(model).observe(rows)
        self._steps.labels(model).inc()
        self._step_seconds.labels(model, _rows_bucket(rows + padding)).observe(duration_s)

    def on_reused(self, *, model: str, kind: str, rows: int) -> None:
        """Rows of one ``kind``, such as ``denoise``, were not computed, because an equal row was."""
        self._reused_rows.labels(model, kind).inc(rows)

    def on_batch_split(self, *, model: str, reason: str) -> None:
        """A pass failed and was split into smaller ones; ``reason`` is ``oom`` (out of memory) or ``error``."""
        self._splits.labels(model, reason).inc()

    def on_cancel_latency(self, *, model: str, seconds: float) -> None:
        """A cancelled job left the engine ``seconds`` after the cancellation."""
        self._cancel_latency.labels(model).observe(seconds)

    def on_engine_restart(self, *, reason: str) -> None:
        """The engine process ended and is replaced; ``reason`` is ``crash`` or ``stall``."""
        self._restarts.labels(reason).inc()

    def on_unexpected_error(self, *, source: str) -> None:
        """An exception ended work of the front process that no call waits for; ``source`` is ``callback``, ``task`` or
        ``thread``."""
        self._unexpected.labels(source).inc()

    def on_model_loaded(self, *, info: ModelInfo, seconds: float) -> None:
        """A model was loaded in ``seconds``. From now on its id is a known label value."""
        self._models.add(info.id)
        self._model_info.labels(info.id, info.digest, info.dtype).set(1)
        self._exact_batching.labels(info.id).set(_EXACTNESS[info.exactness])
        self._model_load.labels(info.id).observe(seconds)

    def on_memory(self, *, device: str, kind: str, bytes: int) -> None:
        """Device memory reported by the engine; ``kind`` is ``allocated``, ``reserved``, ``total`` or ``peak``."""
        self._memory.labels(device, kind).set(bytes)

    # --- store --------------------------------------------------------------------------------------------------

    def on_store_request(self, *, result: str) -> None:
        """A request needed an inversion; ``result`` is ``hit``, ``miss``, ``joined`` or ``expired``.

        ``joined``: another job was computing the same inversion.
        """
        self._store_requests.labels(result).inc()

    def on_eviction(self, *, reason: str) -> None:
        """The store removed an inversion; ``reason`` is ``ttl`` (age) or ``bytes`` (total size)."""
        self._evictions.labels(reason).inc()

    # --- current values -----------------------------------------------------------------------------------------

    def watch_engine(self, engine: EngineView) -> None:
        """Read the engine's gauges from ``engine`` at every scrape."""
        self._at_scrape.engine = engine

    def watch_store(self, store: StoreView) -> None:
        """Read the store's gauges from ``store`` at every scrape."""
        self._at_scrape.store = store

    def watch_directions(self, directions: StoreView) -> None:
        """Read the gauges of stored directions from ``directions`` at every scrape."""
        self._at_scrape.directions = directions

    def watch_operations(self, operations: OperationsView) -> None:
        """Read the gauge of operations from ``operations`` at every scrape."""
        self._at_scrape.operations = operations

    def watch_calls(self, calls: CallsView) -> None:
        """Read the gauges of calls from ``calls`` at every scrape."""
        self._at_scrape.calls = calls

    def watch_log(self, log: LogView) -> None:
        """Read the counter of dropped log lines from ``log`` at every scrape."""
        self._at_scrape.log = log

    # --- definitions --------------------------------------------------------------------------------------------

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def _define_requests(self) -> None:
        count, spread = self._counter, self._histogram
        grpc = ("grpc_type", "grpc_service", "grpc_method")
        self._started = count("grpc_server_started_total", "Calls started.", *grpc)
        self._handled = count("grpc_server_handled_total", "Calls ended, by code.", *grpc, "grpc_code")
        self._handling = spread("grpc_server_handling_seconds", "Arrival to end of a call.", _RPC_S, *grpc)
        self._requests = count(
            "underpaint_requests_total", "Calls ended, by outcome.", "rpc", "method", "code", "reason"
        )
        self._e2e = spread(
            "underpaint_e2e_request_latency_seconds", "Arrival to end of a call.", _LATENCY_S, "rpc", "method", "model"
        )
        self._first_event = spread(
            "underpaint_time_to_first_event_seconds", "Arrival to the first message of a stream.", _QUEUE_S, "method"
        )
        self._request_bytes = spread("underpaint_request_message_bytes", "Messages received.", _BYTES, "rpc")
        self._response_bytes = spread("underpaint_response_message_bytes", "Messages sent.", _BYTES, "rpc")
        self._image_pixels = spread("underpaint_image_pixels", "Pixels of images received.", _PIXELS)
        self._replays = count("underpaint_idempotent_replays_total", "Repeated request ids.", "result")

    def _define_jobs(self) -> None:
        count, spread = self._counter, self._histogram
        self._queue_time = spread(
            "underpaint_request_queue_time_seconds", "Submission to first pass.", _QUEUE_S, "method", "priority"
        )
        self._phase = spread(
            "underpaint_request_phase_seconds", "Time of a job's phase.", _LATENCY_S, "phase", "method"
        )
        self._cancellations = count("underpaint_cancellations_total", "Jobs cancelled.", "method", "stage")
        self._deadline_misses = count("underpaint_deadline_misses_total", "Deadlines missed.", "method", "stage")

    def _define_engine(self) -> None:
        count, spread = self._counter, self._histogram
        self._passes = spread("underpaint_pass_seconds", "Forward passes of any kind.", _STEP_S, "model", "kind")
        self._step_seconds = spread(
            "underpaint_denoising_step_seconds", "Passes of the denoising network.", _STEP_S, "model", "rows_bucket"
        )
        self._steps = count("underpaint_denoising_steps_total", "Passes of the denoising network.", "model")
        self._network_rows = count(
            "underpaint_network_rows_total", "Network rows computed for jobs.", "model", "method"
        )
        self._padding_rows = count("underpaint_padding_rows_total", "Rows that belong to no job.", "model")
        self._reused_rows = count(
            "underpaint_reused_rows_total", "Rows not computed, because an equal row was.", "model", "kind"
        )
        self._batch_rows = spread("underpaint_batch_rows", "Rows of jobs in one pass.", _ROWS, "model")
        self._splits = count("underpaint_batch_splits_total", "Passes split after a failure.", "model", "reason")
        self._cancel_latency = spread(
            "underpaint_cancel_latency_seconds", "Cancellation to end in the engine.", _CANCEL_S, "model"
        )
        self._restarts = count("underpaint_engine_restarts_total", "Engine processes replaced.", "reason")
        self._unexpected = count(
            "underpaint_unexpected_errors_total", "Exceptions in background work of the front process.", "source"
        )
        self._model_load = spread("underpaint_model_load_seconds", "Time to load a model.", _LOAD_S, "model")
        self._model_info = Gauge(
            "underpaint_model_info", "Loaded models.", ("model", "digest", "dtype"), registry=self.registry
        )
        self._exact_batching = Gauge(
            "underpaint_exact_batching",
            "Passes in which equal rows have equal bits: 1 of any size, 0 of a fixed size, -1 none.",
            ("model",),
            registry=self.registry,
        )
        self._memory = Gauge(
            "underpaint_gpu_memory_bytes", "Device memory.", ("device", "kind"), registry=self.registry
        )

    def _define_store(self) -> None:
        self._store_requests = self._counter(
            "underpaint_inversion_store_requests_total", "Look-ups of an inversion.", "result"
        )
        self._evictions = self._counter(
            "underpaint_inversion_store_evictions_total", "Inversions removed for age or size.", "reason"
        )

    def _start_at_zero(self) -> None:
        # rate() misses the first event of a counter that appears with it. So counters with few and fixed label values
        # start at 0.
        for counter, values in (
            (self._replays, ("joined", "replayed", "stored")),
            (self._restarts, ("crash", "stall")),
            (self._unexpected, ("callback", "task", "thread")),
            (self._store_requests, ("hit", "miss", "joined", "expired")),
            (self._evictions, ("ttl", "bytes")),
        ):
            for value in values:
                counter.labels(value)


def _known(value: str, known: tuple[str, ...] | set[str]) -> str:
    return value if value in known else ""


def _rows_bucket(rows: int) -> str:
    return next((str(bucket) for bucket in _ROWS_BUCKETS if rows <= bucket), "inf")
