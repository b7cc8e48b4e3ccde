"""Work that several calls wait for: it runs once, and is cancelled when the last waiting call has left."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from underpaint_server.dispatch.job_handle import JobHandle

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Deadline:
    """The time after which an answer is too late."""

    at: float | None
    """A value of ``time.monotonic()`` in seconds; None for no deadline."""

    @classmethod
    def after(cls, left_s: float | None) -> "Deadline":
        """``left_s`` seconds from now; None for no deadline."""
        return cls(None if left_s is None else time.monotonic() + left_s)

    @property
    def left_s(self) -> float | None:
        """Seconds left, at least 0; None for no deadline."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())

    def or_later(self, other: "Deadline") -> "Deadline":
        """The later of the two."""
        if self.at is None or other.at is None:
            return NEVER
        return Deadline(max(self.at, other.at))


NEVER: Final = Deadline(None)


class SharedCall(Generic[T]):
    """Work that one or more calls wait for, each inside ``with call:``.

    ``run`` is the work; it receives this object. The deadline is the latest of all calls that have joined, so that an
    early deadline of one call does not end the work of others. When the last call leaves, the work is cancelled, after
    ``rejoin_s`` seconds: a caller whose connection broke, which looks the same here as a caller that cancelled, comes
    back within that time and finds its work going on. Work whose deadline has passed is not waited for.
    """

    def __init__(
        self, run: Callable[["SharedCall[T]"], Awaitable[T]], deadline: Deadline, rejoin_s: float = 0.0
    ) -> None:
        self.deadline = deadline
        self._rejoin_s = rejoin_s
        self._abandoned = False
        self._leaving: asyncio.TimerHandle | None = None
        self._handle: JobHandle | None = None
        self._admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._callers = 0
        self._task: asyncio.Future[T] = asyncio.ensure_future(self._run(run))
        self._task.add_done_callback(self._on_done)

    def __enter__(self) -> Self:
        self._callers += 1
        self._stay()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._callers -= 1
        if self._callers == 0 and not self._task.done():
            left_s = self.deadline.left_s
            wait_s = self._rejoin_s if left_s is None else min(self._rejoin_s, left_s)
            if wait_s > 0:
                self._leaving = asyncio.get_running_loop().call_later(wait_s, self._abandon)
            else:
                self._abandon()
        self._drop_failure()

    @property
    def open(self) -> bool:
        """Whether another call may join: the work succeeded, or it runs and is not being cancelled."""
        if self._task.done():
            return not self._task.cancelled() and self._task.exception() is None
        return not self._abandoned

    @property
    def done(self) -> bool:
        """Whether the work ended: it succeeded, failed or was cancelled."""
        return self._task.done()

    @property
    def answer(self) -> T:
        """The answer of work that succeeded."""
        return self._task.result()

    def on_done(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the work ended: when it succeeded, failed or was cancelled."""
        self._task.add_done_callback(lambda _: callback())

    def extend(self, deadline: Deadline) -> None:
        """Extend the deadline for another call that joins; an earlier deadline changes nothing."""
        self.deadline = self.deadline.or_later(deadline)
        if self._handle is not None:
            self._handle.extend(self.deadline.at)

    def admit(self, handle: JobHandle) -> None:
        """Called by the work when the engine has admitted its job."""
        self._handle = handle
        handle.extend(self.deadline.at)
        if not self._admitted.done():
            self._admitted.set_result(None)

    async def admitted(self) -> JobHandle | None:
        """Wait until the engine has admitted the job, and return its handle; None if the work ended.

        Raises the error of work that failed before it was admitted.
        """
        await asyncio.shield(self._admitted)
        return self._handle

    async def result(self) -> T:
        """Wait for the answer; raises what the work raised."""
        return await asyncio.shield(self._task)

    def _abandon(self) -> None:
        self._abandoned = True
        self._task.cancel()

    def _stay(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    async def _run(self, run: Callable[["SharedCall[T]"], Awaitable[T]]) -> T:
        return await run(self)

    def _on_done(self, task: asyncio.Future[T]) -> None:
        # Reading the exception marks it as retrieved: asyncio would log it if the last call left before it was raised.
        error = None if task.cancelled() else task.exception()
        # The answer may be kept for minutes; the image and the latents of the job need not be.
        self._handle = None
        self._stay()
        if not self._admitted.done():
            if task.cancelled():
                self._admitted.cancel()
            elif error is not None:
                self._admitted.set_exception(error)
                self._admitted.exception()
            else:
                self._admitted.set_result(None)
        if error is None and not task.cancelled():
            self._keep_answer(task)
        self._drop_failure()

    def _keep_answer(self, task: asyncio.Future[T]) -> None:
        """Keep the answer without the task, whose context refers to the whole call; it may be kept for minutes."""
        answered: asyncio.Future[Any] = task.get_loop().create_future()
        answered.set_result(task.result())
        self._task = self._admitted = answered

    def _drop_failure(self) -> None:
        """Drop the error of work that failed, once there is no call left to raise it.

        The error refers to the frames of the work, which refer to this object and to the request with its image: with
        a reference back to the error, all of them would stay until the garbage collector comes.
        """
        if self._callers == 0 and self._task.done() and not self.open:
            ended = self._task.get_loop().create_future()
            ended.cancel()
            self._task = self._admitted = ended


class SingleFlight(Generic[T]):
    """Running work by key: a call for a key that is being computed waits for that computation."""

    def __init__(self, on_join: Callable[[], None]) -> None:
        """``on_join`` is called for every call that joins running work."""
        self._calls: dict[Hashable, SharedCall[T]] = {}
        self._on_join = on_join

    def join(self, key: Hashable, run: Callable[[SharedCall[T]], Awaitable[T]], deadline: Deadline) -> SharedCall[T]:
        """The shared call for this key; a new one that runs ``run`` if none is running."""
        call = self._calls.get(key)
        if call is not None and call.open and not call.done:
            self._on_join()
            call.extend(deadline)
            return call
        new_call = self._calls[key] = SharedCall(run, deadline)
        new_call.on_done(lambda: self._forget(key, new_call))
        return new_call

    def _forget(self, key: Hashable, call: SharedCall[T]) -> None:
        if self._calls.get(key) is call:
            del self._calls[key]
