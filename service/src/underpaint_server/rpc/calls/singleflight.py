"""Work that several calls may wait for: it goes on while one of them is left, and ends with the last."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

from underpaint_server.dispatch.job_handle import JobHandle

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Deadline:
    """When an answer is too late."""

    at: float | None
    """A reading of ``time.monotonic``; None for never."""

    @classmethod
    def after(cls, left_s: float | None) -> "Deadline":
        """So many seconds from now; None for never."""
        return cls(None if left_s is None else time.monotonic() + left_s)

    @property
    def left_s(self) -> float | None:
        """Seconds left, 0 at least; None for ever."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())

    def or_later(self, other: "Deadline") -> "Deadline":
        """The later of the two."""
        if self.at is None or other.at is None:
            return NEVER
        return Deadline(max(self.at, other.at))


NEVER: Final = Deadline(None)


class SharedCall(Generic[T]):
    """One piece of work. A call that waits for it is inside ``with flight:``; when the last leaves, it is cancelled.

    Its deadline is the latest of all calls that ever waited for it: nobody's early one may end the work of others.
    """

    def __init__(self, run: Callable[["SharedCall[T]"], Awaitable[T]], deadline: Deadline) -> None:
        self.deadline = deadline
        self._handle: JobHandle | None = None
        self._admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._callers = 0
        self._task = asyncio.ensure_future(self._fly(run))
        self._task.add_done_callback(self._landed)

    def __enter__(self) -> Self:
        self._callers += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._callers -= 1
        if self._callers == 0:
            self._task.cancel()

    @property
    def open(self) -> bool:
        """Whether a new call may still join: it runs and somebody waits for it, or it has ended well."""
        if self._task.done():
            return not self._task.cancelled() and self._task.exception() is None
        return self._callers > 0

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._task.done()

    @property
    def answer(self) -> T:
        """The answer of one that has ended well."""
        return self._task.result()

    def on_done(self, call: Callable[[], None]) -> None:
        """Call this when it has ended, in whatever way."""
        self._task.add_done_callback(lambda _: call())

    def extend(self, deadline: Deadline) -> None:
        """Another call waits for this from now on."""
        self.deadline = self.deadline.or_later(deadline)
        if self._handle is not None:
            self._handle.extend(self.deadline.at)

    def admit(self, handle: JobHandle) -> None:
        """For the work itself: the engine has taken the job."""
        self._handle = handle
        handle.extend(self.deadline.at)
        if not self._admitted.done():
            self._admitted.set_result(None)

    async def admitted(self) -> JobHandle | None:
        """The running job as soon as there is one; None if the work has ended. Raises what it raised before that."""
        await asyncio.shield(self._admitted)
        return self._handle

    async def result(self) -> T:
        """The answer; raises what the work raised."""
        return await asyncio.shield(self._task)

    async def _fly(self, run: Callable[["SharedCall[T]"], Awaitable[T]]) -> T:
        return await run(self)

    def _landed(self, task: "asyncio.Task[T]") -> None:
        # Looking at the exception also marks it as seen: the last caller may have left a moment before it was raised.
        error = None if task.cancelled() else task.exception()
        # An answer may be kept for long; the photo and the latents of its job are not.
        self._handle = None
        if self._admitted.done():
            return
        if task.cancelled():
            self._admitted.cancel()
        elif error is not None:
            self._admitted.set_exception(error)
            self._admitted.exception()
        else:
            self._admitted.set_result(None)


class SingleFlight(Generic[T]):
    """Running work by key: whoever asks for the same thing meanwhile waits for the same."""

    def __init__(self, on_join: Callable[[], None]) -> None:
        self._flights: dict[Hashable, SharedCall[T]] = {}
        self._on_join = on_join

    def join(self, key: Hashable, run: Callable[[SharedCall[T]], Awaitable[T]], deadline: Deadline) -> SharedCall[T]:
        """The flight under that key, a new one if none is under way."""
        flight = self._flights.get(key)
        if flight is not None and flight.open and not flight.done:
            self._on_join()
            flight.extend(deadline)
            return flight
        started = self._flights[key] = SharedCall(run, deadline)
        started.on_done(lambda: self._forget(key, started))
        return started

    def _forget(self, key: Hashable, flight: SharedCall[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
