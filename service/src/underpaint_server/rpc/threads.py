"""Blocking work of the front process (hashing, encoding) on threads, and how many images wait to be decoded."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from underpaint_server.cores import usable_cores
from underpaint_server.errors import QueueFull

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """Threads for work on images.

    At most ``capacity`` requests hold a :meth:`slot` at once, because each keeps an encoded image in memory.
    """

    def __init__(self, capacity: int) -> None:
        threads = max(2, min(8, usable_cores()))
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="pixels")
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
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """Accept no more work and drop what waits; running work ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)
