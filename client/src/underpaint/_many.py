"""Many calls, some of them at once; their results in the order of what was asked."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
_AHEAD = 4
"""Items that are begun before the oldest result is taken, as a multiple of ``concurrency``. One slow item does not stop
the others, and the finished results that wait for it stay few."""


def in_order(call: Callable[[S], T], items: Iterable[S], concurrency: int) -> Iterator[T]:
    """``call`` of each item, ``concurrency`` at once, on threads. At most four times as many items are read
    ahead of the results.

    An error is raised at its item's turn, one of ``items`` itself after the results of the items before. Nothing is
    begun afterwards, nor when the iterator is closed; calls that run by then go on to their end.
    """
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="underpaint-many")
    begun: deque[Future[T]] = deque()
    failure: list[Exception] = []
    try:
        for item in _until(failure, items):
            begun.append(pool.submit(call, item))
            if len(begun) >= _AHEAD * concurrency:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
        if failure:
            raise failure[0]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


async def in_order_async(call: Callable[[S], Awaitable[T]], items: Iterable[S], concurrency: int) -> AsyncIterator[T]:
    """The same as tasks; those that run when an error is raised or when the iterator is closed are cancelled."""
    places = asyncio.Semaphore(concurrency)

    async def run(item: S) -> T:
        async with places:
            return await call(item)

    begun: deque[asyncio.Task[T]] = deque()
    failure: list[Exception] = []
    try:
        for item in _until(failure, items):
            begun.append(asyncio.create_task(run(item)))
            if len(begun) >= _AHEAD * concurrency:
                yield await begun.popleft()
        while begun:
            yield await begun.popleft()
        if failure:
            raise failure[0]
    finally:
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)


def _until(failure: list[Exception], items: Iterable[S]) -> Iterator[S]:
    """The items up to an error of their own, which is put into ``failure``."""
    try:
        yield from items
    except Exception as error:
        failure.append(error)
