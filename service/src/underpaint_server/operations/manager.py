"""Finds unfinished operations in the store, claims them and runs them on this server.

An operation is learning, in jobs of a few optimiser steps each, with the state stored after every job. To run one, a
server claims it. A claim is a lease: the owner renews it before its ``ttl_s`` is over, by writing the claim of the next
number, and another server may take the operation over when the claim is released or was not renewed in time. The
objects in the store and why two owners at one moment do no harm: :mod:`underpaint_server.stores.operations`.

Clocks of different servers are never compared. The owner measures ``ttl_s`` from before it wrote the claim, the others
from when they first read it, which is later: an owner gives the operation up before another server takes it over.
"""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

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
from underpaint_server.telemetry import in_background, report_unexpected

_SCAN_S: Final = 5.0
"""Longest time between two scans of the store's operations, in seconds."""
_FLUSH_S: Final = 5.0
"""Seconds that running operations have to end on their own when the server stops."""


@dataclass(frozen=True, slots=True)
class _ObservedClaim:
    """Another server's newest claim of an operation."""

    number: int
    claim: Claim
    at: float
    """When this server first read it, a reading of ``time.monotonic``."""


class OperationManager:
    """Runs operations on this server, at most ``settings.max_learning`` at a time. To be used on the front's loop."""

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
        """Whether operations are claimed; False while the server stops."""
        self.closed = False
        """Whether :meth:`close` is done: no operation runs on this server any more."""
        self.waiting = self.done = 0
        """Operations that no server runs, and operations that have ended, at the last scan."""
        self.rows = 0
        """Network rows of all unfinished operations, at the last scan."""

    @property
    def running(self) -> int:
        """Operations that run on this server."""
        return len(self._runs)

    def start(self) -> None:
        """Start to scan for operations."""
        self._scanning = in_background(self._scan_repeatedly())

    async def close(self) -> None:
        """Release the operations that run, so that other servers continue from the stored states.

        To be called when the engine takes no jobs any more.
        """
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
        """Scan now, because there is a new operation."""
        self._woken.set()

    def progress(self, name: str) -> tuple[Progress, float | None] | None:
        """Progress and last loss of an operation that runs on this server; None for any other."""
        run = self._runs.get(name)
        return None if run is None else run.progress()

    async def wait_for_end(self, timeout_s: float) -> None:
        """Wait until any operation ends on this server, ``timeout_s`` seconds at most."""
        await _wait(self._ended, timeout_s)

    async def cancel(self, summary: OperationSummary) -> None:
        """End an operation on whichever server it runs, and remove its states; does nothing if it has ended."""
        error = Cancelled("the operation was cancelled")
        if summary.done_at is not None or not await finish(self._parts, summary.name, error):
            return
        run = self._runs.get(summary.name)
        if run is not None:
            await run.stop(release=False)
            await remove_direction(self._parts, summary.name)
        await remove_leftovers(self._parts, summary.name)

    # --- scan -------------------------------------------------------------------------------------------------------

    async def _scan_repeatedly(self) -> None:
        pause_s = min(_SCAN_S, self._parts.settings.claim_ttl_s / 4)
        while True:
            self._woken.clear()
            try:
                await self._scan()
            except StoreUnavailable:
                pass  # logged by the store; the next scan tries again
            except Exception as error:
                report_unexpected("scan of operations failed", error)
            await _wait(self._woken, pause_s)

    async def _scan(self) -> None:
        summaries = await self._parts.operations.scan()
        self._observed = {name: observed for name, observed in self._observed.items() if name in summaries}
        unfinished = sorted((s for s in summaries.values() if s.done_at is None), key=lambda s: (s.created_at, s.name))
        unclaimed = [
            summary for summary in unfinished if summary.name not in self._runs and await self._is_unclaimed(summary)
        ]
        self.waiting, self.done = len(unclaimed), len(summaries) - len(unfinished)
        self.rows = await self._parts.operations.rows(unfinished)
        for summary in unclaimed:
            if await self._may_run(summary):
                await self._take(summary)
        for summary in summaries.values():
            await self._sweep(summary)

    async def _is_unclaimed(self, summary: OperationSummary) -> bool:
        """Whether the operation has no claim, or its newest claim is released or expired."""
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
                return False  # it ended after the scan
            observed = self._observed[summary.name] = _ObservedClaim(summary.claim, claim, time.monotonic())
        return observed.claim.released or time.monotonic() > observed.at + observed.claim.ttl_s

    async def _may_run(self, summary: OperationSummary) -> bool:
        """Whether this server has a free learning slot and a loaded model that can run the operation."""
        engine, slots = self._parts.engine, self._parts.settings.max_learning
        if not self.taking or self.running >= slots or engine.state is not EngineState.READY:
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
            return  # another server claimed it first
        if attempts >= MAX_LOST:
            error = Bug(f"{attempts} servers in a row ended while they ran the operation; it is not tried again")
            await finish(self._parts, summary.name, error)
            return
        held = HeldClaim(summary.claim + 1, claim, before + ttl_s)
        self._runs[summary.name] = OperationRun(self._parts, summary.name, held, self._on_end)

    async def _sweep(self, summary: OperationSummary) -> None:
        """Of an operation that has ended, remove the leftovers at once and the rest after ``operation_ttl_s``."""
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
    """Wait for the event, ``timeout_s`` seconds at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):  # wait_for would lose a cancel that comes together with the event
            await event.wait()
