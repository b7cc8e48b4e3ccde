"""Keeps one engine process alive: starts it, notices its end, starts it again, gives up when that does not help."""

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
"""Crashes in a row, without a job that ended well in between, after which the engine counts as failed."""
FIRST_DELAY_S = 0.2
"""Before the first restart; twice that before the next, and so on."""
RESTART_S = 2.0
"""What callers are told to wait at first; another replica may take the call."""
MAX_RESTART_S = 30.0
"""What they are told to wait at most."""


class EngineState(Enum):
    """Of the engine process."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    CLOSED = "closed"


class Listener(Protocol):
    """Who wants to know. Called on the loop that started the engine."""

    def on_report(self, report: Report) -> None:
        """The engine said something; a Ready comes after the state became READY."""

    def on_crash(self) -> None:
        """The process ended, and everything inside it is lost; the state is RESTARTING."""

    def on_failed(self, message: str) -> None:
        """It will not come back; the state is FAILED."""


class Supervisor:
    """Owns the process. What a process says after its successor was started is not heard."""

    def __init__(self, settings: Settings, metrics: Metrics, listener: Listener) -> None:
        self.state = EngineState.STARTING
        self.error = ""
        """Why the state is FAILED, else empty."""
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
        """Spawn the process; READY comes later."""
        self._spawned = time.monotonic()
        self._process = EngineProcess(self._settings, self._on_report, self._on_exit)

    @property
    def restart_s(self) -> float:
        """What a caller who comes during a restart is told to wait: of a client's three retries, the last comes after
        the end of a start as long as the last one, however long this model takes to load."""
        return min(MAX_RESTART_S, max(RESTART_S, self._start_s * 2 / 3))

    def send(self, order: Order) -> None:
        """Send an order; one that the process no longer reads is lost with it, and a crash follows."""
        if self._process is not None:
            self._process.send(order)

    def end_stalled(self) -> None:
        """End a process that makes no progress; it is restarted."""
        if self._process is not None and self.state is EngineState.READY:
            self._reason = "stall"
            self._process.kill()

    def reset_crashes(self) -> None:
        """A job ended well: the crashes before it do not count any more."""
        self._crashes = 0

    async def wait_ready(self) -> None:
        """Until the state is READY; raises :class:`ModelNotReady` if it never will be."""
        while self.state in (EngineState.STARTING, EngineState.RESTARTING):
            await self._changed.wait()
        if self.state is not EngineState.READY:
            raise ModelNotReady(self.error or "the engine is closed")

    async def stop(self) -> None:
        """End the process for good."""
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
