"""Metrics as Prometheus reads them: names that pass its own rules, values that follow the events."""

import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field, replace

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from support.promtool import lint, promtool
from underpaint_server.jobs import Exactness, ModelInfo, Phase, Priority
from underpaint_server.methods import JOB_NAMES
from underpaint_server.telemetry import Metrics

UNITS = (
    "seconds",
    "bytes",
    "total",
    "rows",
    "pixels",
    "info",
    "running",
    "waiting",
    "capacity",
    "entries",
    "ready",
    "size",
    "batching",
)


@dataclass
class Engine:
    """State that a scrape reads."""

    num_running: int = 0
    queue_capacity: int = 64
    backlog_s: float = 0.0
    last_pass_at: float | None = None
    waiting: dict[Priority, int] = field(default_factory=dict)
    models_ready: dict[str, bool] = field(default_factory=dict)
    max_batch_sizes: dict[tuple[str, str, str], int] = field(default_factory=dict)

    def num_waiting(self, priority: Priority) -> int:
        return self.waiting.get(priority, 0)


@dataclass
class Store:
    """The same of a store."""

    total_bytes: int = 0
    entries: int = 0


MODEL = ModelInfo("mini", "d" * 64, "float32", ("edict",), 64, 64, 8, 50, 77, None, "vae", True, "f" * 16)


def busy() -> Metrics:
    """Metrics after at least one of every event."""
    metrics = Metrics()
    metrics.watch_engine(Engine(num_running=2, backlog_s=7.5, last_pass_at=1000.0, waiting={Priority.NORMAL: 3}))
    metrics.watch_store(Store(total_bytes=4096, entries=2))
    metrics.on_model_loaded(info=MODEL, seconds=1.2)
    metrics.on_request_started(service="underpaint.v1.EditService", rpc="Edit", grpc_type="unary")
    metrics.on_request_handled(
        service="underpaint.v1.EditService",
        rpc="Edit",
        grpc_type="unary",
        code="OK",
        seconds=3.0,
        method="edict",
        model="mini",
    )
    metrics.on_first_event(method="edict", seconds=0.02)
    metrics.on_request_message(rpc="Edit", bytes=100_000)
    metrics.on_response_message(rpc="Edit", bytes=50_000)
    metrics.on_image(pixels=512 * 512)
    metrics.on_replay(result="joined")
    metrics.on_queue_time(method="edict", priority=Priority.INTERACTIVE, seconds=0.3)
    metrics.on_phase(phase=Phase.INVERTING, method="edict", seconds=2.0)
    metrics.on_cancelled(method="edict", stage="running")
    metrics.on_deadline_missed(method="edict", stage="queued")
    metrics.on_pass(
        model="mini",
        kind="denoise",
        is_network=True,
        rows_by_method={"edict": 4, "diffedit": 2},
        padding=2,
        duration_s=0.03,
    )
    metrics.on_pass(
        model="mini", kind="decode", is_network=False, rows_by_method={"edict": 1}, padding=0, duration_s=0.2
    )
    metrics.on_batch_split(model="mini", reason="oom")
    metrics.on_cancel_latency(model="mini", seconds=0.01)
    metrics.on_engine_restart(reason="crash")
    metrics.on_memory(device="cuda:0", kind="peak", bytes=1 << 30)
    metrics.on_store_request(result="hit")
    metrics.on_eviction(reason="ttl")
    return metrics


def rendered(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_names_pass_prometheus_rules() -> None:
    assert lint(rendered(busy())) == []


def test_names_pass_promtool() -> None:
    assert promtool(rendered(busy())) == []


def test_the_rules_catch_what_they_are_for() -> None:
    registry = CollectorRegistry()
    Histogram("underpaint_wait_ms", "", registry=registry)
    Counter("underpaintJobs", "Jobs.", registry=registry)
    problems = lint(generate_latest(registry).decode())
    assert [problem.split(": ")[1] for problem in problems] == ["no help", "not a base unit", "not snake_case"]


def test_own_names_have_the_prefix_and_a_unit() -> None:
    own = [f for f in text_string_to_metric_families(rendered(busy())) if f.name.startswith("underpaint")]
    assert len(own) > 25
    for family in own:
        name = family.name + ("_total" if family.type == "counter" else "")
        assert name.startswith("underpaint_")
        assert name.rsplit("_", 1)[1] in UNITS


def test_a_pass_counts_rows_padding_and_steps() -> None:
    metrics = busy()
    assert value(metrics, "underpaint_network_rows_total", model="mini", method="edict") == 4
    assert value(metrics, "underpaint_network_rows_total", model="mini", method="diffedit") == 2
    assert value(metrics, "underpaint_padding_rows_total", model="mini") == 2
    assert value(metrics, "underpaint_denoising_steps_total", model="mini") == 1
    assert value(metrics, "underpaint_batch_rows_sum", model="mini") == 6
    assert value(metrics, "underpaint_denoising_step_seconds_count", model="mini", rows_bucket="8") == 1


def test_only_the_network_makes_steps() -> None:
    metrics = Metrics()
    metrics.on_pass(
        model="mini", kind="decode", is_network=False, rows_by_method={"edict": 3}, padding=1, duration_s=0.2
    )
    assert value(metrics, "underpaint_pass_seconds_count", model="mini", kind="decode") == 1
    for name in ("denoising_steps_total", "network_rows_total", "padding_rows_total", "batch_rows_count"):
        assert f"underpaint_{name}{{" not in rendered(metrics)


@pytest.mark.parametrize(
    ("exactness", "said"),
    [(Exactness.ANY_SIZE, 1), (Exactness.ROW_BY_ROW, 1), (Exactness.FIXED_SIZE, 0), (Exactness.INEXACT, -1)],
)
def test_a_model_says_in_which_passes_it_is_exact_and_says_it_anew_after_a_restart(
    exactness: Exactness, said: int
) -> None:
    metrics = Metrics()
    for info in (MODEL, replace(MODEL, exactness=exactness)):
        metrics.on_model_loaded(info=info, seconds=1.0)
    assert value(metrics, "underpaint_exact_batching", model=MODEL.id) == said


def test_gauges_are_what_the_engine_says_at_each_scrape() -> None:
    metrics, engine = Metrics(), Engine()
    metrics.watch_engine(engine)
    assert value(metrics, "underpaint_num_requests_waiting", priority="batch") == 0
    assert value(metrics, "underpaint_engine_last_step_timestamp_seconds") is None
    engine.waiting[Priority.BATCH] = 5
    engine.models_ready = {"mini": True, "broken": False}
    engine.num_running, engine.backlog_s, engine.last_pass_at = 3, 12.5, time.time()
    assert value(metrics, "underpaint_num_requests_waiting", priority="batch") == 5
    assert value(metrics, "underpaint_num_requests_waiting", priority="interactive") == 0
    assert value(metrics, "underpaint_num_requests_running") == 3
    assert value(metrics, "underpaint_queue_capacity") == 64
    engine.max_batch_sizes = {("mini", "denoise", "own"): 8}
    assert value(metrics, "underpaint_max_batch_size", model="mini", kind="denoise", size="own") == 8
    assert value(metrics, "underpaint_model_ready", model="mini") == 1
    assert value(metrics, "underpaint_model_ready", model="broken") == 0
    assert value(metrics, "underpaint_estimated_backlog_seconds") == 12.5
    assert value(metrics, "underpaint_engine_last_step_timestamp_seconds") == engine.last_pass_at


def test_gauges_are_what_the_store_says_at_each_scrape() -> None:
    metrics, store = Metrics(), Store(100, 1)
    assert value(metrics, "underpaint_inversion_store_bytes") is None
    metrics.watch_store(store)
    store.total_bytes, store.entries = 300, 3
    assert value(metrics, "underpaint_inversion_store_bytes") == 300
    assert value(metrics, "underpaint_inversion_store_entries") == 3


def test_requests_are_counted_by_outcome() -> None:
    metrics = busy()
    metrics.on_request_handled(
        service="underpaint.v1.EditService",
        rpc="Edit",
        grpc_type="unary",
        code="UNAVAILABLE",
        reason="QUEUE_FULL",
        seconds=0.001,
        method="edict",
        model="mini",
    )
    assert value(metrics, "underpaint_requests_total", rpc="Edit", method="edict", code="OK", reason="") == 1
    refused = {"rpc": "Edit", "method": "edict", "code": "UNAVAILABLE", "reason": "QUEUE_FULL"}
    assert value(metrics, "underpaint_requests_total", **refused) == 1
    handled = {"grpc_type": "unary", "grpc_service": "underpaint.v1.EditService", "grpc_method": "Edit"}
    assert value(metrics, "grpc_server_started_total", **handled) == 1
    assert value(metrics, "grpc_server_handled_total", **handled, grpc_code="UNAVAILABLE") == 1
    assert value(metrics, "grpc_server_handling_seconds_count", **handled) == 2


def test_callers_cannot_make_labels() -> None:
    metrics = busy()
    for number in range(50):
        metrics.on_request_handled(
            service="underpaint.v1.EditService",
            rpc="Edit",
            grpc_type="unary",
            code="NOT_FOUND",
            reason="MODEL_NOT_FOUND",
            seconds=0.001,
            method=JOB_NAMES[number % len(JOB_NAMES)] if number % 2 else f"method-{number}",
            model=f"model-{number}",
        )
    text = rendered(metrics)
    assert "model-" not in text
    assert "method-" not in text


def test_counters_of_rare_events_are_there_before_the_first() -> None:
    metrics = Metrics()
    assert value(metrics, "underpaint_engine_restarts_total", reason="crash") == 0
    assert value(metrics, "underpaint_unexpected_errors_total", source="task") == 0
    assert value(metrics, "underpaint_inversion_store_evictions_total", reason="bytes") == 0


def test_a_real_scrape_carries_the_process_and_the_build() -> None:
    metrics = busy()
    server, thread = start_http_server(0, addr="127.0.0.1", registry=metrics.registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
            text = answer.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {"process_resident_memory_bytes", "python_gc_collections", "underpaint_build_info"} <= names
    assert not any(name.endswith("_created") for name in names)


def test_a_given_registry_gets_no_stock_collectors() -> None:
    registry = CollectorRegistry()
    assert Metrics(registry).registry is registry
    assert "process_" not in generate_latest(registry).decode()


@pytest.mark.parametrize("module", ["torch", "grpc", "diffusers", "transformers"])
def test_telemetry_stays_light(module: str) -> None:
    code = f"import sys, underpaint_server.telemetry as t; t.Metrics(); sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
