"""Blocking work of the front (decoding, hashing, encoding) on a few threads, with a bound on how much may wait."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from underpaint_server.errors import QueueFull

P = ParamSpec("P")
T = TypeVar("T")


class Pool:
    """Threads for pixels.

    At most ``capacity`` calls of :meth:`admit` hold a place at once: what they wait for keeps whole images in memory.
    """

    def __init__(self, capacity: int) -> None:
        threads = max(2, min(8, os.cpu_count() or 2))
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="pixels")
        self._capacity = max(capacity, threads)
        self._taken = 0

    async def admit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run new work on a thread; raises QueueFull where too much waits for one already."""
        if self._taken >= self._capacity:
            raise QueueFull("too many images wait to be decoded; come back in a second", retry_after_s=1.0)
        self._taken += 1
        try:
            return await self.run(work, *args, **kwargs)
        finally:
            self._taken -= 1

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run work that a request with a place already needs."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """Let no more work in; what runs ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)
