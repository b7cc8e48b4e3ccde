"""Logging of a process: every log line, also of libraries, is one JSON object on stderr."""

import logging
import sys

import structlog
from structlog.typing import Processor

LEVELS = ("debug", "info", "warning", "error")
"""Log levels that can be configured, in increasing severity."""


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
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    _route_standard_library(number, shared)


def _processors() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]


def _route_standard_library(level: int, shared: list[Processor]) -> None:
    handler = logging.StreamHandler(sys.stderr)
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
