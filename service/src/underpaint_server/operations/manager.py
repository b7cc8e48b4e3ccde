"""Takes operations and runs them: learning, a few optimiser steps a job, with the state stored between two jobs.

An operation is nobody's until it is claimed, and anybody's again when its owner releases the claim or falls silent. The
rules that make this safe are in :mod:`underpaint_server.stores.operations`: whatever two owners do at the same moment,
each step is kept once, and the end is written once.

A claim is void when the next one has not come for its ``ttl_s``. Everybody measures that on a clock of their own: the
owner from before it wrote the claim, the others from when they first saw it, which is later. So clocks of different
servers are never compared, and an owner that runs gives up before anybody else takes over.
"""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

import structlog

from underpaint_server.dispatch.queue import Dispatcher
from underpaint_server.dispatch.supervisor import EngineState
from underpaint_server.errors import Bug, Cancelled, StoreCorrupt, StoreUnavailable
from underpaint_server.jobs import Descent, Progress
from underpaint_server.operations.runner import (
    MAX_LOST,
    Encoder,
    HeldClaim,
    OperationRun,
    Parts,
    finish,
    remove_direction,
    remove_leftovers,
)
from underpaint_server.settings import Settings
from underpaint_server.stores.directions import DirectionStore
from underpaint_server.stores.operations import Claim, OperationStore, OperationSummary

_LOOK_S: Final = 5.0
"""Time between two looks at the whole place, at most."""
_FLUSH_S: Final = 5.0

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _ObservedClaim:
    """A claim, as first seen."""

    number: int
    claim: Claim
    at: float
    """A reading of ``time.monotonic``."""


class OperationManager:
    """Lives on the front's loop."""

    def __init__(
        self,
        settings: Settings,
        engine: Dispatcher,
        operations: OperationStore,
        directions: DirectionStore,
        encoder: Encoder,
    ) -> None:
        self._parts = Parts(settings, engine, operations, directions, encoder)
        self._owner = uuid4().hex
        self._runs: dict[str, OperationRun] = {}
        self._observed: dict[str, _ObservedClaim] = {}
        self._woken, self._ended = asyncio.Event(), asyncio.Event()
        self._scanning: asyncio.Task[None] | None = None
        self.taking = True
        """Whether operations are taken; False once the server is about to stop."""
        self.closed = False
        """Whether nothing ends here any more."""
        self.waiting = self.done = 0
        """Operations that nobody runs, and that have ended, at the last look."""

    @property
    def running(self) -> int:
        """Operations that run here."""
        return len(self._runs)

    def start(self) -> None:
        """Look for operations from now on."""
        self._scanning = asyncio.create_task(self._scan_repeatedly())

    async def close(self) -> None:
        """Release what runs: its state is stored, and others go on from there. The engine takes no job any more."""
        self.taking = False
        if self._scanning is not None:
            self._scanning.cancel()
            await asyncio.gather(self._scanning, return_exceptions=True)
        runs = list(self._runs.values())
        if runs:
            await asyncio.wait([run.task for run in runs], timeout=_FLUSH_S)
        await asyncio.gather(*(run.stop(release=True) for run in runs))
        self.closed = True
        self._ended.set()

    def wake(self) -> None:
        """There is a new operation."""
        self._woken.set()

    def progress(self, name: str) -> tuple[Progress, float | None] | None:
        """How far an operation is that runs here, and its last loss; None for any other."""
        run = self._runs.get(name)
        return None if run is None else run.progress()

    async def wait_for_end(self, timeout_s: float) -> None:
        """Until some operation has ended here, or so many seconds."""
        await _wait(self._ended, timeout_s)

    async def cancel(self, summary: OperationSummary) -> None:
        """End an operation wherever it runs; nothing of what was learned is kept. One that has ended stays as it is."""
        error = Cancelled("the operation was cancelled")
        if summary.done_at is not None or not await finish(self._parts, summary.name, error):
            return
        run = self._runs.get(summary.name)
        if run is not None:
            await run.stop(release=False)
            await remove_direction(self._parts, summary.name)
        await remove_leftovers(self._parts, summary.name)

    # --- looking ----------------------------------------------------------------------------------------------------

    async def _scan_repeatedly(self) -> None:
        pause_s = min(_LOOK_S, self._parts.settings.claim_ttl_s / 4)
        while True:
            self._woken.clear()
            try:
                await self._scan()
            except StoreUnavailable:
                pass  # the log has it, and the next look is soon
            except Exception:
                _log.exception("looking for operations failed")
            await _wait(self._woken, pause_s)

    async def _scan(self) -> None:
        found = await self._parts.operations.scan()
        self._observed = {name: observed for name, observed in self._observed.items() if name in found}
        unfinished = sorted((s for s in found.values() if s.done_at is None), key=lambda s: (s.created_at, s.name))
        free = [
            summary for summary in unfinished if summary.name not in self._runs and await self._is_unclaimed(summary)
        ]
        self.waiting, self.done = len(free), len(found) - len(unfinished)
        for summary in free:
            if await self._may_run(summary):
                await self._take(summary)
        for summary in found.values():
            await self._sweep(summary)

    async def _is_unclaimed(self, summary: OperationSummary) -> bool:
        """Whether nobody runs it, as far as this server can see."""
        if summary.claim == 0:
            return True
        observed = self._observed.get(summary.name)
        if observed is None or observed.number != summary.claim:
            try:
                claim = await self._parts.operations.claim_of(summary)
            except StoreCorrupt as error:
                await finish(self._parts, summary.name, error)
                return False
            if claim is None:
                return False  # it has just ended
            observed = self._observed[summary.name] = _ObservedClaim(summary.claim, claim, time.monotonic())
        return observed.claim.released or time.monotonic() > observed.at + observed.claim.ttl_s

    async def _may_run(self, summary: OperationSummary) -> bool:
        """Whether it can be run here and now."""
        engine, most = self._parts.engine, self._parts.settings.max_learning
        if not self.taking or self.running >= most or engine.state is not EngineState.READY:
            return False
        try:
            task = await self._parts.operations.task(summary.name)
        except StoreCorrupt as error:
            await finish(self._parts, summary.name, error)
            return False
        info = engine.models.get(task.model) if task is not None else None
        if task is None or info is None or info.digest != task.model_digest or not info.content_features:
            return False
        return info.gradients or not isinstance(task.options.method, Descent)

    async def _take(self, summary: OperationSummary) -> None:
        observed, ttl_s = self._observed.get(summary.name), self._parts.settings.claim_ttl_s
        attempts = 0
        if observed is not None and not observed.claim.released and summary.iteration <= observed.claim.iteration:
            attempts = observed.claim.attempts + 1
        claim, before = Claim(self._owner, ttl_s, attempts, summary.iteration), time.monotonic()
        if not await self._parts.operations.claim(summary.name, summary.claim + 1, claim):
            return  # somebody else was faster
        if attempts >= MAX_LOST:
            error = Bug(f"{attempts} servers ended with this work in them; it is given up")
            await finish(self._parts, summary.name, error)
            return
        held = HeldClaim(summary.claim + 1, claim, before + ttl_s)
        self._runs[summary.name] = OperationRun(self._parts, summary.name, held, self._on_end)

    async def _sweep(self, summary: OperationSummary) -> None:
        """What is left of an operation that has ended: its parts at once, itself after its time."""
        if summary.done_at is None or summary.name in self._runs:
            return
        if summary.done_at + self._parts.settings.operation_ttl_s < time.time():
            await self._parts.operations.forget(summary)
        elif summary.leftovers:
            await self._parts.operations.clear(summary)

    def _on_end(self, run: OperationRun) -> None:
        del self._runs[run.name]
        self._ended.set()
        self._ended = asyncio.Event()
        self._woken.set()


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event, or so many seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):  # wait_for would lose a cancel that comes together with the event
            await event.wait()
