"""Blocking work of the front process (decoding, hashing, encoding) on threads, bounded in number and in memory."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, ParamSpec, TypeVar

from underpaint_server.cores import usable_cores
from underpaint_server.errors import QueueFull

P = ParamSpec("P")
T = TypeVar("T")

LARGE_PX: Final = 4 * 1024 * 1024
"""Images of more pixels than this are large."""
LARGE_AT_ONCE: Final = 2
"""Number of large images decoded at once. A file of a few kilobytes can decode to a hundred megabytes."""


class Threads:
    """Threads for work on images.

    At most ``capacity`` requests hold a :meth:`slot` at once, because each keeps an encoded image in memory.
    """

    def __init__(self, capacity: int) -> None:
        threads = max(2, min(8, usable_cores()))
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="pixels")
        self._large = ThreadPoolExecutor(LARGE_AT_ONCE, thread_name_prefix="large-pixels")
        self._capacity = max(capacity, threads)
        self._taken = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold a slot for new work; raises QueueFull if all are taken."""
        if self._taken >= self._capacity:
            raise QueueFull("too many images are waiting to be decoded; retry in a second", retry_after_s=1.0)
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work`` on a thread and return its result."""
        return await _run(self._executor, lambda: work(*args, **kwargs))

    async def decode(self, pixels: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work`` that decodes an image of ``pixels`` pixels; at most ``LARGE_AT_ONCE`` large ones run at once."""
        executor = self._large if pixels > LARGE_PX else self._executor
        return await _run(executor, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """Accept no more work and drop what waits; running work ends by itself."""
        for executor in (self._executor, self._large):
            executor.shutdown(wait=False, cancel_futures=True)


async def _run(executor: Executor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, work)
