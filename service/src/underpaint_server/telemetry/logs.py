"""Logging of a process: every log line, also of libraries, is one JSON object on stderr.

Lines are written by a :class:`LineWriter`, so that no call waits for the reader of stderr or fails with it.
"""

import atexit
import io
import json
import logging
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from types import TracebackType
from typing import Any, Final

import structlog
from structlog.typing import Processor

from underpaint_server.telemetry.lines import LineWriter

LEVELS = ("debug", "info", "warning", "error")
"""Log levels that can be configured, in increasing severity."""

_STDERR: Final = 2
_EXIT_S: Final = 2.0
"""Longest time that the end of the process waits for log lines to be written."""
_PRINTED_CHARS: Final = 16 * 1024
_LIBRARY_CHARS: Final = 500


def configure_logging(level: str) -> None:
    """Configure structlog and the standard library's logging of this process; times are UTC in ISO 8601.

    Lines below ``level``, one of :data:`LEVELS`, are dropped. Raises ValueError for any other level.
    """
    if level not in LEVELS:
        raise ValueError(f"log level '{level}' is none of {', '.join(LEVELS)}")
    number = logging.getLevelNamesMapping()[level.upper()]
    shared = _processors()
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=log_lines()),  # type: ignore[arg-type]  # has write and flush
    )
    _route_standard_library(number, shared)


@cache
def log_lines() -> LineWriter:
    """The writer of this process's log lines."""
    writer = LineWriter(_STDERR, lambda dropped: _line("log lines were dropped", "telemetry", lines=dropped))
    atexit.register(writer.wait, _EXIT_S)
    return writer


def log_prints() -> None:
    """Make log lines of what is printed to ``sys.stderr``, and of exceptions that nobody catches."""
    log: Any = structlog.get_logger("python")

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        log.error("uncaught exception", exc_info=(kind, error, trace))

    sys.excepthook = uncaught
    threading.excepthook = lambda args: uncaught(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
    sys.unraisablehook = lambda args: uncaught(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
    sys.stderr = _Printed(log_lines().write)


class _Printed(io.TextIOBase):
    """A stderr of which every line becomes a log line; for libraries that print."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._line = ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        if len(self._line) > _PRINTED_CHARS:
            lines.append(self._line)
            self._line = ""
        for line in lines:
            if line.strip():
                self._write(_line(line, "stderr"))
        return len(text)

    def fileno(self) -> int:
        return _STDERR


def _line(event: str, logger: str, **fields: object) -> str:
    """A log line that needs no configured logging."""
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    return json.dumps({"event": event, "logger": logger, "level": "warning", "timestamp": now, **fields}) + "\n"


def _processors() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]


def _route_standard_library(level: int, shared: list[Processor]) -> None:
    handler = logging.StreamHandler(log_lines())
    handler.addFilter(_shorten_grpc)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)


def _shorten_grpc(record: logging.LogRecord) -> bool:
    """Shorten what gRPC logs of one call: its traces show only its own frames, for text that any caller can send."""
    if record.name.partition(".")[0] == "grpc":
        record.msg, record.args = record.getMessage()[:_LIBRARY_CHARS], ()
        record.exc_info = record.exc_text = None
    return True
