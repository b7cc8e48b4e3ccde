"""Log lines of a real process: one JSON object each, on stderr only."""

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta
from typing import Any

import pytest
from support.waiting import PATIENCE_S
from underpaint_server.telemetry import configure_logging
from underpaint_server.telemetry.lines import LineWriter


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


def test_what_is_printed_to_stderr_is_lines_too() -> None:
    body = """
import sys
from underpaint_server.telemetry import log_prints
log_prints()
print("half", end="", file=sys.stderr); print(" and half\\n\\nanother", file=sys.stderr)
assert sys.stderr.fileno() == 2
"""
    assert [(line["logger"], line["event"]) for line in logged("info", body)] == [
        ("stderr", "half and half"),
        ("stderr", "another"),
    ]


def test_exceptions_that_nobody_catches_are_one_line_each() -> None:
    body = """
import sys, threading
from underpaint_server.telemetry import log_prints
log_prints()
def fail(): raise ValueError("in a thread")
thread = threading.Thread(target=fail); thread.start(); thread.join()
class Finalized:
    def __del__(self): raise ValueError("in a finalizer")
Finalized()
try: raise ValueError("at the top")
except ValueError: sys.excepthook(*sys.exc_info())
"""
    lines = logged("info", body)
    assert [line["event"] for line in lines] == ["uncaught exception"] * 3
    assert all(word in line["exception"] for line, word in zip(lines, ("thread", "finalizer", "top"), strict=True))


def test_what_grpc_logs_of_a_call_is_short_and_has_no_trace() -> None:
    body = """
import logging
try:
    b"\\xff".decode()
except UnicodeDecodeError:
    logging.getLogger("grpc._cython.cygrpc").exception("Invalid encoding on %s", "x" * 9999)
"""
    [line] = logged("info", body)
    assert line["event"].startswith("Invalid encoding on xxx")
    assert len(line["event"]) < 1000
    assert "exception" not in line


# --- lines that cannot be written ---------------------------------------------------------------------------------


class Pipe:
    """A writer of lines whose reader is in this test."""

    def __init__(self, max_bytes: int = 100_000) -> None:
        self.reader, self.writer = os.pipe()
        self.lines = LineWriter(self.writer, lambda dropped: f"dropped {dropped}\n", max_bytes)

    def read(self, word: bytes) -> bytes:
        """What arrives, up to a word."""
        received = b""
        while word not in received:
            received += os.read(self.reader, 65536)
        return received


def test_a_reader_that_stops_reading_stops_nobody() -> None:
    pipe = Pipe()
    for number in range(3000):
        pipe.lines.write(f"{number:0100}\n")  # more than the pipe and the queue hold together
    kept = 3000 - pipe.lines.dropped
    assert 0 < kept < 3000
    received = pipe.read(f"dropped {3000 - kept}\n".encode())
    numbers = [int(line) for line in received.decode().splitlines() if not line.startswith("dropped")]
    assert len(numbers) == kept, "whole lines"
    assert numbers == sorted(set(numbers)), "in their order"
    pipe.lines.write("after\n")
    pipe.read(b"after\n")


def test_a_reader_that_is_gone_is_counted_and_fails_nobody() -> None:
    pipe = Pipe()
    os.close(pipe.reader)
    for _ in range(5):
        pipe.lines.write("nobody reads this\n")
    pipe.lines.wait(PATIENCE_S)
    assert pipe.lines.dropped == 5


def test_a_full_disk_is_counted_and_fails_nobody() -> None:
    with open("/dev/full", "wb") as full:
        lines = LineWriter(full.fileno(), str)
        lines.write("no room\n")
        lines.wait(PATIENCE_S)
        assert lines.dropped == 1


def test_a_descriptor_that_somebody_made_non_blocking_loses_nothing() -> None:
    pipe = Pipe(max_bytes=10_000_000)
    os.set_blocking(pipe.writer, False)
    for number in range(3000):
        pipe.lines.write(f"{number:0100}\n")
    assert len(pipe.read(b"2999\n").splitlines()) == 3000
    assert pipe.lines.dropped == 0


def test_text_that_is_no_unicode_is_written() -> None:
    pipe = Pipe()
    pipe.lines.write("\udcff\n")
    assert pipe.read(b"\n") == b"\\udcff\n"
