"""How many calls one server has in progress, with how many bytes, and how long they may wait for their own request.

gRPC's core keeps the parts of a message until all of it is there, and says nothing of them until then. So a caller who
holds back the end of a message holds its memory. What bounds it is here: the time that a request may take to arrive,
and the number of requests that take longer than a moment.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from underpaint_server.errors import QueueFull, RequestIncomplete

_PROMPT_S: Final = 1.0
"""A request that is complete within this many seconds counts as no slow one."""
_OLD_S: Final = 10.0
"""A slow request that has taken this many seconds makes room for a new one."""
_RETRY_S: Final = 1.0
_UNLIMITED: Final = "/grpc.health.v1.Health/Check"
"""A full server must still answer its probes."""


class CallLimits:
    """The limits of one server: ``max_calls`` in progress, ``max_slow`` whose request is slow, ``arrival_s`` seconds
    for a request to arrive, ``max_bytes`` of the requests of all calls in progress.

    A call with one request counts as one in progress when its request is there: callers who send none would otherwise
    keep the others out.
    """

    def __init__(self, *, max_calls: int, max_slow: int, arrival_s: float, max_bytes: int) -> None:
        self._max_calls = max_calls
        self._max_slow = max_slow
        self._arrival_s = arrival_s
        self._max_bytes = max_bytes
        self._slow: dict[asyncio.Timeout, float] = {}
        """The timeouts of slow requests, the oldest first, each with its loop time."""
        self.calls = 0
        """Calls in progress."""
        self.held_bytes = 0
        """Bytes of the requests of calls in progress."""

    @property
    def slow_requests(self) -> int:
        """Calls whose request has not arrived completely within a second."""
        return len(self._slow)

    @contextmanager
    def call(self, path: str, size: int) -> Iterator[None]:
        """Count a call with a request of ``size`` bytes while it lasts; raises QueueFull beyond a limit.

        A request larger than the limit is accepted where no other is held.
        """
        if self.calls >= self._max_calls and path != _UNLIMITED:
            raise QueueFull(
                f"{self.calls} calls are in progress, the limit of this server; retry later", retry_after_s=_RETRY_S
            )
        if self.held_bytes and self.held_bytes + size > self._max_bytes:
            raise QueueFull(
                f"the requests of other calls take {self.held_bytes} bytes of memory, and {size} more would exceed the"
                f" limit of {self._max_bytes}; retry later",
                retry_after_s=_RETRY_S,
            )
        self.calls += 1
        self.held_bytes += size
        try:
            yield
        finally:
            self.calls -= 1
            self.held_bytes -= size

    @asynccontextmanager
    async def arrival(self) -> AsyncIterator[None]:
        """Limit the time that the body takes to read a request.

        Raises RequestIncomplete after ``arrival_s`` seconds; QueueFull earlier, if too many other requests are slow.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(self._arrival_s) as timeout:
                timer = loop.call_later(_PROMPT_S, self._turn_slow, timeout, began)
                try:
                    yield
                finally:
                    timer.cancel()
                    self._slow.pop(timeout, None)
        except TimeoutError:
            if loop.time() < began + self._arrival_s:
                raise QueueFull(
                    "too many requests are slow to arrive, and this one made room for others; retry",
                    retry_after_s=_RETRY_S,
                ) from None
            raise RequestIncomplete(
                f"the request did not arrive completely within {self._arrival_s:g} s, the limit of this server"
            ) from None

    def _turn_slow(self, timeout: asyncio.Timeout, began: float) -> None:
        now = asyncio.get_running_loop().time()
        if len(self._slow) >= self._max_slow:
            oldest = next(iter(self._slow))
            if now - self._slow[oldest] < _OLD_S:
                timeout.reschedule(now)
                return
            del self._slow[oldest]
            oldest.reschedule(now)
        self._slow[timeout] = began
