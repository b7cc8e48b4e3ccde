"""Log lines of a real process: one JSON object each, on stderr only."""

import json
import subprocess
import sys
from datetime import datetime, timedelta
from typing import Any

import pytest
from underpaint_server.telemetry import configure_logging


def logged(level: str, body: str) -> list[dict[str, Any]]:
    """The lines that ``body`` logs in a process of its own."""
    code = f"from underpaint_server.telemetry import configure_logging\nconfigure_logging({level!r})\n{body}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_a_line_has_time_level_event_and_fields() -> None:
    [line] = logged("info", "import structlog; structlog.get_logger().info('listening', port=50051)")
    assert (line["level"], line["event"], line["port"]) == ("info", "listening", 50051)
    assert datetime.fromisoformat(line["timestamp"]).utcoffset() == timedelta(0)


def test_lines_below_the_level_are_dropped() -> None:
    body = """
import logging, structlog
for log in (structlog.get_logger(), logging.getLogger("library")):
    log.debug("debug"); log.info("info"); log.warning("warning"); log.error("error")
"""
    assert [line["event"] for line in logged("warning", body)] == ["warning", "error"] * 2
    assert len(logged("debug", body)) == 8


def test_libraries_write_the_same_lines() -> None:
    [line] = logged("info", "import logging; logging.getLogger('grpc.aio').warning('%d calls', 3)")
    assert (line["logger"], line["level"], line["event"]) == ("grpc.aio", "warning", "3 calls")
    assert "timestamp" in line


def test_warnings_are_lines_too() -> None:
    [line] = logged("info", "import warnings; warnings.warn('old')")
    assert line["logger"] == "py.warnings"
    assert "old" in line["event"]


def test_an_exception_keeps_its_traceback_on_one_line() -> None:
    body = """
import structlog
try:
    1 / 0
except ZeroDivisionError:
    structlog.get_logger().exception("failed", request_id="r")
"""
    [line] = logged("info", body)
    assert "ZeroDivisionError" in line["exception"]
    assert line["request_id"] == "r"


def test_context_reaches_every_line() -> None:
    body = """
import logging, structlog
with structlog.contextvars.bound_contextvars(request_id="r"):
    structlog.get_logger().info("ours")
    logging.getLogger("library").info("theirs")
"""
    assert [line["request_id"] for line in logged("info", body)] == ["r", "r"]


def test_an_unknown_level_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'loud' is none of debug, info, warning, error"):
        configure_logging("loud")
