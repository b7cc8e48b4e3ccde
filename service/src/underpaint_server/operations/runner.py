"""Runs one claimed operation: learning in chunks, each one job of the engine, with the state stored after each.

Claims and their renewal are explained in :mod:`underpaint_server.operations.manager`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeVar

import structlog

from underpaint_server.dispatch.job_handle import JobHandle
from underpaint_server.dispatch.queue import Dispatcher
from underpaint_server.errors import (
    Bug,
    DirectionExists,
    DirectionNotFound,
    Draining,
    ModelLoading,
    ModelNotReady,
    OperationNotFound,
    QueueFull,
    StoreCorrupt,
    StoreUnavailable,
    UnderpaintError,
    WorkerRestarted,
)
from underpaint_server.jobs import Direction, Generated, Learned, LearnJob, LearnState, Phase, Photo, Priority, Progress
from underpaint_server.settings import Settings
from underpaint_server.stores.directions import DirectionStore
from underpaint_server.stores.directions import Entry as DirectionEntry
from underpaint_server.stores.operations import Claim, OperationStore, Task
from underpaint_server.telemetry import in_background, report_unexpected

T = TypeVar("T")

MAX_LOST: Final = 3
"""Engine processes, or servers, in a row that may end while they run an operation and before they store a new state;
then the operation fails."""

_WATCH_S: Final = 1.0
"""Longest time between two checks whether another server ended the operation, in seconds."""
_RETRY_S: Final = 1.0
"""Seconds before a retry whose error names no time."""
_PUBLISH_S: Final = 5.0
"""Seconds that storing a direction has to end when the server stops."""

_log = structlog.get_logger()


class Encoder(Protocol):
    """Encodes the outcome of an operation as the bytes that are stored."""

    def succeeded(self, name: str, entry: DirectionEntry) -> bytes:
        """The outcome of operation ``name``, which learned and stored ``entry``."""

    def failed(self, name: str, error: UnderpaintError, request_id: str) -> bytes:
        """The outcome of operation ``name``, which failed or was cancelled with ``error``."""

    def is_error(self, data: bytes) -> bool:
        """Whether :meth:`failed` wrote ``data``; raises :class:`StoreCorrupt` if neither method did."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of the server that running an operation needs."""

    settings: Settings
    engine: Dispatcher
    operations: OperationStore
    directions: DirectionStore
    encoder: Encoder


@dataclass(frozen=True, slots=True)
class HeldClaim:
    """A claim that this server holds."""

    number: int
    claim: Claim
    until: float
    """When it expires, a reading of ``time.monotonic``."""


class _ClaimLost(Exception):
    """The claim expired, or another server claimed or ended the operation."""


class OperationRun:
    """Runs one operation from its newest stored state on.

    ``task`` ends when the operation ends or this server gives it up; then ``on_end`` is called.
    """

    def __init__(self, parts: Parts, name: str, held: HeldClaim, on_end: Callable[["OperationRun"], None]) -> None:
        self.name = name
        self._parts = parts
        self._held = held
        self._state: LearnState | None = None
        self._handle: JobHandle | None = None
        self._total = 0
        self._reached = 0.0
        """Most optimiser steps ever done: progress must not fall when the engine ends and a chunk is repeated."""
        self._publishing = False
        self._began = (time.monotonic(), 0)
        self.task = in_background(self._run())
        self.task.add_done_callback(lambda _: on_end(self))

    async def stop(self, *, release: bool) -> None:
        """Stop to run the operation, after storing its direction if that has begun.

        With ``release``, the claim is released, so that another server can continue at once.
        """
        if self._publishing:
            await asyncio.wait((self.task,), timeout=_PUBLISH_S)
        ended = self.task.done()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        if release and not ended:
            await self._release("DRAINING")

    def progress(self) -> tuple[Progress, float | None]:
        """Progress in optimiser steps, and the last loss; None before the first."""
        state, handle = self._state, self._handle
        done = state.iteration if state else 0
        loss = state.losses[-1] if state and state.losses else None
        job = handle.progress if handle is not None and not handle.done else None
        if job is None or job.phase is Phase.QUEUED:
            phase = Phase.OPTIMIZING if done else Phase.QUEUED
            position = job.queue_position if job else 0
            return Progress(phase, done, self._total, self._fraction(done), position, self._left_s(done)), loss
        chunk = min(self._parts.settings.learn_checkpoint_every, self._total - done)
        step = {Phase.OPTIMIZING: job.step, Phase.DENOISING: chunk, Phase.DECODING: chunk}.get(job.phase, 0)
        reached = done + job.fraction * chunk
        fraction = self._fraction(reached)
        return Progress(Phase.OPTIMIZING, done + step, self._total, fraction, 0, self._left_s(reached)), loss

    def _fraction(self, reached: float) -> float:
        self._reached = max(self._reached, reached)
        return min(1.0, self._reached / max(1, self._total))

    def _left_s(self, reached: float) -> float:
        began, first = self._began
        return (time.monotonic() - began) / (reached - first) * (self._total - reached) if reached > first else 0.0

    # --- life -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        outcome = await self._outcome()
        if outcome is not None and not await retry_store(lambda: finish(self._parts, self.name, outcome)):
            await retry_store(lambda: remove_direction(self._parts, self.name))
        await retry_store(lambda: remove_leftovers(self._parts, self.name))

    async def _outcome(self) -> DirectionEntry | UnderpaintError | None:
        """The outcome of the operation; None if another server has it, or this server released it."""
        try:
            return await self._until_lost(self._work())
        except _ClaimLost:
            _log.info("operation lost", operation=self.name)
            return None
        except (Draining, ModelNotReady) as error:
            await self._release(error.reason)
            return None
        except UnderpaintError as error:
            return error
        except Exception:
            _log.exception("operation failed", operation=self.name)
            return Bug(f"internal error; the server log has operation {self.name}")

    async def _until_lost(self, work: Awaitable[T]) -> T:
        """Run ``work`` and return its result; raises :class:`_ClaimLost` when the claim is lost first."""
        working, watching = asyncio.ensure_future(work), asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise _ClaimLost
            return working.result()
        finally:
            for task in (working, watching):
                task.cancel()
            _, watched = await asyncio.gather(working, watching, return_exceptions=True)
            if isinstance(watched, Exception) and not isinstance(watched, _ClaimLost):
                report_unexpected(f"the claim of operation {self.name} cannot be watched", watched)

    async def _watch(self) -> None:
        """Renew the claim; returns when the operation has ended, raises :class:`_ClaimLost` when the claim is lost."""
        ttl_s = self._held.claim.ttl_s
        while True:
            await asyncio.sleep(min(_WATCH_S, ttl_s / 4))
            try:
                async with asyncio.timeout(self._held.until - time.monotonic()):
                    if await self._parts.operations.is_done(self.name):
                        return
                    if time.monotonic() > self._held.until - ttl_s * 2 / 3:
                        await self._claim_again(self._held.claim)
            except (StoreUnavailable, TimeoutError):
                self._check_held()

    async def _claim_again(self, claim: Claim) -> None:
        before, number = time.monotonic(), self._held.number + 1
        if not await self._parts.operations.claim(self.name, number, claim):
            raise _ClaimLost
        self._held = HeldClaim(number, claim, before + claim.ttl_s)

    async def _release(self, reason: str) -> None:
        _log.info("operation released", operation=self.name, reason=reason)
        with suppress(_ClaimLost, StoreUnavailable):  # then another server has it, or the claim expires
            await self._claim_again(replace(self._held.claim, released=True))

    def _check_held(self) -> None:
        if time.monotonic() >= self._held.until:
            raise _ClaimLost

    # --- work -----------------------------------------------------------------------------------------------------

    async def _work(self) -> DirectionEntry:
        operations = self._parts.operations
        # After claiming, not before: the previous owner may have stored a newer state until then.
        summary = await retry_store(lambda: operations.summary(self.name))
        self._state = await retry_store(lambda: operations.state_of(summary))
        task = await retry_store(lambda: operations.task(self.name))
        assert task is not None
        self._total = task.options.method.optimization_steps
        self._began = (time.monotonic(), summary.iteration)
        _log.info("operation taken", operation=self.name, iteration=summary.iteration, claim=self._held.number)
        examples = await retry_store(lambda: operations.examples(self.name, task))
        while not (learned := await self._chunk(task, examples)).done:
            self._state = learned.state
            self._check_held()
            if not await retry_store(lambda: operations.save_state(self.name, learned.state)):
                raise _ClaimLost
            _log.info(
                "operation kept", operation=self.name, iteration=learned.state.iteration, loss=learned.state.losses[-1]
            )
        self._state = learned.state
        return await self._publish(task, learned.state)

    async def _chunk(self, task: Task, examples: tuple[Photo | Generated, ...]) -> Learned:
        """Run the next few optimiser steps as one job; repeat it when the engine process ended meanwhile.

        Raises :class:`Bug` after :data:`MAX_LOST` engine processes.
        """
        engine = self._parts.engine
        job = LearnJob(task.model, task.options, examples, self._state, self._parts.settings.learn_checkpoint_every)
        lost = 0
        while True:
            handle = None
            try:
                handle = self._handle = engine.submit(job, priority=Priority.LEARNING, deadline_s=None)
                learned = await handle.result()
            except (WorkerRestarted, ModelLoading):
                lost += handle is not None
                if lost >= MAX_LOST:
                    raise Bug(f"the engine process ended {lost} times while it ran this operation") from None
                await engine.wait_ready()
            except QueueFull as error:
                await asyncio.sleep(error.retry_after_s or _RETRY_S)
            else:
                assert isinstance(learned, Learned)
                return learned
            finally:
                if handle is not None:
                    handle.cancel()

    async def _publish(self, task: Task, state: LearnState) -> DirectionEntry:
        """Store the direction; if an earlier owner of this operation stored it before it ended, return that one."""
        info, directions = self._parts.engine.models.get(task.model), self._parts.directions
        if info is None:
            raise ModelNotReady(f"{task.model} is not loaded any more")
        direction = Direction(
            display_name=task.display_name,
            model=task.model,
            model_digest=task.model_digest,
            options=task.options,
            weights=state.best_weights,
            losses=state.losses,
            content_features=info.content_features,
            example_count=len(task.examples),
            operation=self.name,
        )
        self._check_held()
        self._publishing = True
        try:
            return await retry_store(lambda: directions.create(task.direction, direction))
        except DirectionExists:
            entry = await retry_store(lambda: directions.get(task.direction))
            if entry.direction.operation != self.name:
                raise
            return entry


# --- outcomes and leftovers -------------------------------------------------------------------------------------------


async def retry_store(call: Callable[[], Awaitable[T]]) -> T:
    """The result of ``call``, which is repeated for as long as it raises :class:`StoreUnavailable`."""
    while True:
        try:
            return await call()
        except StoreUnavailable as error:
            await asyncio.sleep(error.retry_after_s or _RETRY_S)


async def finish(parts: Parts, name: str, outcome: DirectionEntry | UnderpaintError) -> bool:
    """Store the outcome of an operation; False if it had ended before. After an error, its direction is removed."""
    if not await parts.operations.finish(name, await _encoded(parts, name, outcome)):
        return False
    _log.info("operation ended", operation=name, reason=outcome.reason if isinstance(outcome, UnderpaintError) else "")
    if isinstance(outcome, UnderpaintError):
        await remove_direction(parts, name)
    return True


async def remove_direction(parts: Parts, name: str) -> None:
    """Remove the direction of an operation that ended with an error; it may have been stored just before that."""
    with suppress(DirectionNotFound, StoreCorrupt):
        outcome, task = await parts.operations.outcome(name), await parts.operations.task(name)
        if outcome is None or task is None or not parts.encoder.is_error(outcome):
            return
        entry = await parts.directions.get(task.direction)
        if entry.direction.operation == name:
            await parts.directions.delete(task.direction, entry.etag)


async def remove_leftovers(parts: Parts, name: str) -> None:
    """Remove examples, claims and states of an operation if it has ended."""
    with suppress(OperationNotFound):
        summary = await parts.operations.summary(name)
        if summary.done_at is not None:
            await parts.operations.clear(summary)


async def _encoded(parts: Parts, name: str, outcome: DirectionEntry | UnderpaintError) -> bytes:
    if isinstance(outcome, DirectionEntry):
        return parts.encoder.succeeded(name, outcome)
    try:
        task = await parts.operations.task(name)
    except StoreCorrupt:
        task = None
    return parts.encoder.failed(name, outcome, task.request_id if task is not None else "")
