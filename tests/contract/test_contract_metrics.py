"""Names that others rely on: whatever the alerts and rules ask for is exported, and whatever is exported says what."""

import re
from pathlib import Path

import pytest
from support.front import merged
from underpaint.v1 import direction_service_pb2, edit_service_pb2, inversion_service_pb2
from underpaint_server.jobs import Phase, Priority
from underpaint_server.methods import JOB_NAMES
from underpaint_server.rpc.calls.record import labels_of
from underpaint_server.telemetry import Metrics

ROOT = Path(__file__).parents[2]
RULES = sorted([*(ROOT / "deploy" / "prometheus").glob("rules*.yml"), *(ROOT / "deploy").rglob("*.json")])
NAME = re.compile(r'(?<![\w:])(?:underpaint|grpc_server)_[a-z0-9_:]+(?=[{\[)\s"])')
AT_SCRAPE = {
    "underpaint_num_requests_running", "underpaint_num_requests_waiting", "underpaint_queue_capacity",
    "underpaint_estimated_backlog_seconds", "underpaint_engine_last_step_timestamp_seconds",
    "underpaint_inversion_store_bytes", "underpaint_inversion_store_entries", "underpaint_operations",
    "underpaint_request_bytes_held", "underpaint_log_lines_dropped_total", "underpaint_model_ready",
    "underpaint_direction_store_bytes", "underpaint_direction_store_entries",
    "underpaint_operations_rows", "underpaint_calls_in_progress", "underpaint_slow_requests",
    "underpaint_max_batch_size",
}  # fmt: skip


def exported() -> dict[str, str]:
    """Sample name -> help of everything that a server can export."""
    names = dict.fromkeys(AT_SCRAPE, "see telemetry.scrape")
    for family in Metrics().registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        names |= {family.name + suffix: family.documentation for suffix in suffixes}
    return names


def test_every_metric_says_what_it_is() -> None:
    told = {name: text for name, text in exported().items() if name.startswith(("underpaint_", "grpc_server_"))}
    assert len(told) > 40
    assert all(len(text) > 8 for text in told.values())


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.name)
def test_rules_ask_for_metrics_that_exist(path: Path) -> None:
    asked = {name for name in NAME.findall(path.read_text()) if ":" not in name}
    assert asked <= exported().keys()


def test_rules_ask_for_metrics_at_all() -> None:
    assert len({name for path in RULES for name in NAME.findall(path.read_text())} & exported().keys()) > 10


def test_every_request_has_a_label_of_the_closed_list() -> None:
    served = ("sdedit", "ddim", "edict", "diffedit", "disentangled", "content_injection")
    labels = {labels_of(merged(edit_service_pb2.EditRequest(), **{name: {}})).method for name in served}
    labels |= {
        labels_of(merged(inversion_service_pb2.InvertRequest(), parameters={name: {}})).method
        for name in ("edict", "ddim")
    }
    labels.add(labels_of(edit_service_pb2.ComputeMaskRequest()).method)
    labels.add(labels_of(direction_service_pb2.LearnDirectionRequest()).method)
    assert labels == set(JOB_NAMES)


def test_the_wire_and_the_jobs_have_the_same_phases_and_priorities() -> None:
    from underpaint.v1 import types_pb2

    assert {f"PHASE_{phase.name}" for phase in Phase} == set(types_pb2.Phase.keys()) - {"PHASE_UNSPECIFIED"}
    chosen = [priority for priority in Priority if priority is not Priority.LEARNING]  # which is not for callers
    assert {f"PRIORITY_{priority.name}" for priority in chosen} == set(types_pb2.Priority.keys()) - {
        "PRIORITY_UNSPECIFIED"
    }
    assert all(types_pb2.Priority.Value(f"PRIORITY_{priority.name}") == int(priority) for priority in chosen)
