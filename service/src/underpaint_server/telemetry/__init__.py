"""Telemetry for operators: Prometheus metrics and JSON log lines."""

from underpaint_server.telemetry.logs import configure_logging, log_lines, log_prints
from underpaint_server.telemetry.metrics import Metrics
from underpaint_server.telemetry.scrape import EngineView, StoreView

__all__ = ["EngineView", "Metrics", "StoreView", "configure_logging", "log_lines", "log_prints"]
