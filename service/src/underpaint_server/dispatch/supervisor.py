"""Keeps an engine process: starts it, replaces it after a crash or a stall, and keeps a spare one to replace it with.

Nothing that fails here is final, except that no model can be loaded when the server starts: every other failure is
tried again, after a longer delay each time. After too many in a row the state is FAILED until an attempt succeeds.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Protocol

import structlog

from underpaint_server.dispatch.process import EngineProcess
from underpaint_server.dispatch.stall import CpuUse
from underpaint_server.engine.messages import Load, LoadFailed, Order, Ready, Report
from underpaint_server.errors import ModelNotReady, UnderpaintError, WorkerRestarted
from underpaint_server.settings import Settings
from underpaint_server.telemetry import Metrics, report_unexpected

log = structlog.get_logger(__name__)

MAX_CRASHES = 5
"""Restarts in a row, without a successful job in between; the next crash makes the state FAILED."""
MAX_REFUSED = 2
"""Attempts in a row to spawn a process that the system may refuse before :attr:`Supervisor.is_stuck`."""
FIRST_DELAY_S = 0.2
"""Backoff in seconds before the first restart; doubled for each further one in a row."""
MAX_DELAY_S = 30.0
"""Largest backoff, in seconds."""
LOADING_S = 2.0
"""``retry_after_s`` of calls that are refused before the models have loaded for the first time, in seconds."""
RESTART_S = 1.0
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
    """No model can be loaded, or too many crashes in a row."""
    CLOSED = "closed"


class Listener(Protocol):
    """Receives the engine's reports and state changes, on the event loop that started the engine."""

    def on_report(self, report: Report) -> None:
        """The engine sent ``report``; the state is READY before its :class:`Ready` is passed on."""

    def on_crash(self) -> None:
        """The process ended and the jobs inside it are lost; the state is RESTARTING or FAILED."""

    def on_failed(self) -> None:
        """No process can serve now; the state is FAILED."""


class Supervisor:
    """Owns the engine process. Reports of a process whose successor was started are ignored."""

    def __init__(self, settings: Settings, metrics: Metrics, listener: Listener) -> None:
        self.state = EngineState.STARTING
        self.error = ""
        """Why the state is FAILED; empty in any other state."""
        self.errors: Mapping[str, UnderpaintError] = {}
        """Id of each model that the last process could not load -> why."""
        self._settings = settings
        self._metrics = metrics
        self._listener = listener
        self._process: EngineProcess | None = None
        self._spare: EngineProcess | None = None
        self._timers: set[asyncio.TimerHandle] = set()
        self._crashes = self._refused = self._lost_spares = 0
        self._reason, self._cause = "crash", ""
        self._given_up = False
        self._was_ready = False
        self._began = self._start_s = 0.0
        self._changed = asyncio.Event()

    def start(self) -> None:
        """Start the process, without waiting until it is ready; if the system refuses it, try again later."""
        self._began = time.monotonic()
        process, self._spare = self._spare or self._spawn(), None
        if process is None:
            self._refused += 1
            self._later(self._refused, self.start)
            return
        self._refused = 0
        self._process = process
        process.send(Load())

    @property
    def restart_s(self) -> float:
        """``retry_after_s`` of calls during a restart, in seconds: two thirds of the last start's duration, within
        :data:`RESTART_S` and :data:`MAX_RESTART_S`. A caller then seldom asks more than twice before it is ready."""
        return min(MAX_RESTART_S, max(RESTART_S, self._start_s * 2 / 3))

    @property
    def refusal(self) -> UnderpaintError:
        """What calls end with while the state is FAILED: an error to retry, unless no attempt can mend it."""
        if self._given_up:
            return ModelNotReady(self.error)
        return WorkerRestarted(f"{self.error}; it is started again, retry later", retry_after_s=MAX_RESTART_S)

    @property
    def is_stuck(self) -> bool:
        """Whether the process gets no CPU time, or cannot be started because the system refuses it again and again."""
        return self._refused > MAX_REFUSED or (self._process is not None and self._process.is_frozen)

    @property
    def use(self) -> CpuUse:
        """CPU time of the process."""
        return CpuUse(self._settings.stall_s) if self._process is None else self._process.use

    def cpu_s(self) -> float | None:
        """CPU seconds that the process has used; None where they are not known."""
        return None if self._process is None else self._process.cpu_s()

    def send(self, order: Order) -> None:
        """Send an order to the process; dropped if the process has ended, in which case a crash is reported."""
        if self._process is not None:
            self._process.send(order)

    def look(self, elapsed_s: float) -> None:
        """Watch the processes for ``elapsed_s`` seconds more; kill those that are frozen, so that they are replaced."""
        if self._process is not None:
            self._process.look(elapsed_s)
            if self._process.is_frozen:
                self.end_stalled()
        if self._spare is not None:
            self._spare.look(elapsed_s)
            if self._spare.is_frozen:
                self._spare.kill()

    def end_stalled(self) -> None:
        """Kill a process that makes no progress, so that it is replaced."""
        if self._process is not None:
            self._reason = "stall"
            self._process.kill()

    def reset_crashes(self) -> None:
        """Reset the count of crashes in a row, after a job that succeeded."""
        self._crashes = 0

    async def wait_ready(self) -> None:
        """Wait until the state is READY; raises :class:`ModelNotReady` if no attempt is made any more."""
        while self.state is not EngineState.READY:
            if self._given_up or self.state is EngineState.CLOSED:
                raise ModelNotReady(self.error or "the engine is closed")
            await self._changed.wait()

    async def stop(self) -> None:
        """End the processes without a restart."""
        was_ready = self.state is EngineState.READY
        self._set(EngineState.CLOSED)
        for timer in self._timers:
            timer.cancel()
        stops = [self._spare.stop(politely=False)] if self._spare is not None else []
        if self._process is not None:
            stops.append(self._process.stop(politely=was_ready))
        await asyncio.gather(*stops)

    # --- processes -------------------------------------------------------------------------------------------------

    def _spawn(self) -> EngineProcess | None:
        """A new process; None if the system refuses it."""
        try:
            return EngineProcess(self._settings, self._on_report, self._on_exit)
        except Exception as error:  # no descriptor, process, thread or memory is free
            report_unexpected("the engine process cannot be started", error)
            return None

    def _spawn_spare(self) -> None:
        """Start the spare process, which imports what it needs and then waits; if that fails, try again later."""
        if not self._settings.spare_engine or self._spare is not None or self.state is not EngineState.READY:
            return
        self._spare = self._spawn()
        if self._spare is None:
            self._lose_spare()

    def _lose_spare(self) -> None:
        self._spare = None
        self._lost_spares += 1
        self._later(self._lost_spares, self._spawn_spare)

    def _later(self, failures: int, attempt: Callable[[], None]) -> None:
        """Make another attempt, after a delay that grows with the failures in a row; repeat it if it raises."""
        delay_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** min(failures - 1, 10))

        def run() -> None:
            self._timers.discard(timer)
            try:
                attempt()
            except Exception as error:
                report_unexpected("the engine process cannot be started", error)
                self._later(failures + 1, attempt)

        timer = asyncio.get_running_loop().call_later(delay_s, run)
        self._timers.add(timer)

    # --- what the processes say ------------------------------------------------------------------------------------

    def _on_report(self, process: EngineProcess, report: Report) -> None:
        if process is not self._process or self.state is EngineState.CLOSED:
            return
        try:
            match report:
                case LoadFailed(errors=errors):
                    self._on_load_failed(errors)
                case Ready():
                    self._on_ready(process, report)
                case _:
                    self._listener.on_report(report)
        except Exception as error:  # what was lost with the report is unknown, so the jobs inside must begin again
            report_unexpected("a report of the engine process was not handled, so the process is replaced", error)
            process.kill()

    def _on_load_failed(self, errors: Mapping[str, UnderpaintError]) -> None:
        self.errors = errors
        self._cause = "; ".join(f"{name}: {error.message}" for name, error in errors.items())
        log.error("no model can be loaded", error=self._cause)
        if not self._was_ready and all(isinstance(error, ModelNotReady) for error in errors.values()):
            self._given_up = True
            self._fail(self._cause)

    def _on_ready(self, process: EngineProcess, report: Ready) -> None:
        loading_s = sum(seconds for _, seconds in report.models)
        self._start_s = loading_s if self._settings.spare_engine else time.monotonic() - self._began
        self.error, self.errors = "", report.failed
        self._was_ready = True
        self._lost_spares = 0
        self._set(EngineState.READY)
        log.info("engine ready", pid=process.pid, seconds=round(time.monotonic() - self._began, 2))
        self._listener.on_report(report)
        self._spawn_spare()

    def _on_exit(self, process: EngineProcess, exit_code: int | None) -> None:
        if self.state is EngineState.CLOSED:
            return
        if process is self._spare:
            log.warning("spare engine ended", exit_code=exit_code)
            self._lose_spare()
        elif process is self._process:
            self._process = None
            if self._given_up:
                return
            self._crashes += 1
            try:
                self._on_crash(exit_code)
            except Exception as error:
                report_unexpected("the end of the engine process was not handled", error)
            self._later(self._crashes, self.start)

    def _on_crash(self, exit_code: int | None) -> None:
        reason, self._reason = self._reason, "crash"
        cause, self._cause = self._cause or f"last with exit code {exit_code}", ""
        log.error("engine ended", exit_code=exit_code, reason=reason, in_a_row=self._crashes)
        is_given_up = self._crashes > MAX_CRASHES
        self._set(EngineState.FAILED if is_given_up else EngineState.RESTARTING)
        self._listener.on_crash()
        self._metrics.on_engine_restart(reason=reason)
        if is_given_up:
            self._fail(f"the engine process ended {self._crashes} times in a row, {cause}")

    def _fail(self, message: str) -> None:
        self.error = message
        log.error("engine failed", error=message)
        self._set(EngineState.FAILED)
        self._listener.on_failed()

    def _set(self, state: EngineState) -> None:
        self.state = state
        self._changed.set()
        self._changed = asyncio.Event()
