"""Starts the engine process and restarts it after a crash or a stall, until it crashed too often in a row."""

import asyncio
import time
from enum import Enum
from typing import Protocol

import structlog

from underpaint_server.dispatch.process import EngineProcess
from underpaint_server.engine.messages import LoadFailed, Order, Ready, Report
from underpaint_server.errors import ModelNotReady
from underpaint_server.settings import Settings
from underpaint_server.telemetry import Metrics

log = structlog.get_logger(__name__)

MAX_CRASHES = 5
"""Restarts in a row, without a successful job in between; the next crash makes the state FAILED."""
FIRST_DELAY_S = 0.2
"""Backoff in seconds before the first restart; doubled for each further one in a row."""
RESTART_S = 2.0
"""Smallest ``retry_after_s``, in seconds, of calls that are refused during a restart."""
MAX_RESTART_S = 30.0
"""Largest ``retry_after_s``, in seconds, of calls that are refused during a restart."""


class EngineState(Enum):
    """State of the engine process."""

    STARTING = "starting"
    """Loading the models for the first time."""
    READY = "ready"
    RESTARTING = "restarting"
    """The process ended; its successor is not ready yet."""
    FAILED = "failed"
    """A model cannot be loaded, or too many crashes in a row; only a restart of the server helps."""
    CLOSED = "closed"


class Listener(Protocol):
    """Receives the engine's reports and state changes, on the event loop that started the engine."""

    def on_report(self, report: Report) -> None:
        """The engine sent ``report``; the state is READY before its :class:`Ready` is passed on."""

    def on_crash(self) -> None:
        """The process ended and the jobs inside it are lost; the state is RESTARTING."""

    def on_failed(self, message: str) -> None:
        """The engine will not be restarted, because of ``message``; the state is FAILED."""


class Supervisor:
    """Owns the engine process. Reports of a process whose successor was started are ignored."""

    def __init__(self, settings: Settings, metrics: Metrics, listener: Listener) -> None:
        self.state = EngineState.STARTING
        self.error = ""
        """Why the state is FAILED; empty in any other state."""
        self._settings = settings
        self._metrics = metrics
        self._listener = listener
        self._process: EngineProcess | None = None
        self._restart: asyncio.TimerHandle | None = None
        self._crashes = 0
        self._reason = "crash"
        self._spawned = self._start_s = 0.0
        self._changed = asyncio.Event()

    def start(self) -> None:
        """Spawn the process, without waiting until it is ready."""
        self._spawned = time.monotonic()
        self._process = EngineProcess(self._settings, self._on_report, self._on_exit)

    @property
    def restart_s(self) -> float:
        """``retry_after_s`` of calls during a restart, in seconds: two thirds of the last start's duration, within
        :data:`RESTART_S` and :data:`MAX_RESTART_S`. The last of a client's three retries then comes after a restart
        that takes as long, whatever the size of the model."""
        return min(MAX_RESTART_S, max(RESTART_S, self._start_s * 2 / 3))

    def send(self, order: Order) -> None:
        """Send an order to the process; dropped if the process has ended, in which case a crash is reported."""
        if self._process is not None:
            self._process.send(order)

    def end_stalled(self) -> None:
        """Kill a process that makes no passes, so that it is restarted."""
        if self._process is not None and self.state is EngineState.READY:
            self._reason = "stall"
            self._process.kill()

    def reset_crashes(self) -> None:
        """Reset the count of crashes in a row, after a job that succeeded."""
        self._crashes = 0

    async def wait_ready(self) -> None:
        """Wait until the state is READY; raises :class:`ModelNotReady` if it is FAILED or CLOSED."""
        while self.state in (EngineState.STARTING, EngineState.RESTARTING):
            await self._changed.wait()
        if self.state is not EngineState.READY:
            raise ModelNotReady(self.error or "the engine is closed")

    async def stop(self) -> None:
        """End the process without a restart."""
        self._set(EngineState.CLOSED)
        if self._restart is not None:
            self._restart.cancel()
        if self._process is not None:
            await self._process.stop()

    def _on_report(self, process: EngineProcess, report: Report) -> None:
        if process is not self._process or self.state is EngineState.CLOSED:
            return
        if isinstance(report, LoadFailed):
            self._fail(report.error.message)
            return
        if isinstance(report, Ready):
            self._start_s = time.monotonic() - self._spawned
            self._set(EngineState.READY)
        self._listener.on_report(report)

    def _on_exit(self, process: EngineProcess, exit_code: int | None) -> None:
        if process is not self._process or self.state in (EngineState.CLOSED, EngineState.FAILED):
            return
        self._crashes += 1
        reason, self._reason = self._reason, "crash"
        log.error("engine ended", exit_code=exit_code, reason=reason, in_a_row=self._crashes)
        self._metrics.on_engine_restart(reason=reason)
        if self._crashes > MAX_CRASHES:
            self._fail(f"the engine process ended {self._crashes} times in a row, last with exit code {exit_code}")
            return
        self._set(EngineState.RESTARTING)
        self._listener.on_crash()
        delay_s = FIRST_DELAY_S * 2 ** (self._crashes - 1)
        self._restart = asyncio.get_running_loop().call_later(delay_s, self.start)

    def _fail(self, message: str) -> None:
        self.error = message
        log.error("engine failed", error=message)
        self._set(EngineState.FAILED)
        self._listener.on_failed(message)

    def _set(self, state: EngineState) -> None:
        self.state = state
        self._changed.set()
        self._changed = asyncio.Event()
