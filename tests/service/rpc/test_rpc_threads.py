"""Threads for pixels: small pictures pass large ones, of which few are held in memory at once."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from support.waiting import until
from underpaint_server.errors import QueueFull
from underpaint_server.rpc.threads import LARGE_AT_ONCE, LARGE_PX, Threads


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[Threads]:
    pool = Threads(capacity=20)
    yield pool
    pool.close()


class Gate:
    """Work that waits; knows how many are inside, and how many were at most."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.inside = self.most = 0
        self._lock = threading.Lock()

    def pass_(self) -> None:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.open.wait()
        with self._lock:
            self.inside -= 1


async def test_large_pictures_are_few_at_once_and_hold_up_no_small_one(pool: Threads) -> None:
    gate = Gate()
    large = [asyncio.create_task(pool.decode(LARGE_PX + 1, gate.pass_)) for _ in range(6)]
    await until(lambda: gate.inside >= LARGE_AT_ONCE)
    for _ in range(10):
        assert await pool.decode(LARGE_PX, lambda: "small") == "small"
    gate.open.set()
    await asyncio.gather(*large)
    assert gate.most == LARGE_AT_ONCE


async def test_a_large_picture_counts_until_its_thread_is_done_with_it(pool: Threads) -> None:
    gate = Gate()
    left = [asyncio.create_task(pool.decode(LARGE_PX + 1, gate.pass_)) for _ in range(LARGE_AT_ONCE)]
    await until(lambda: gate.inside >= LARGE_AT_ONCE)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    next_ = asyncio.create_task(pool.decode(LARGE_PX + 1, gate.pass_))
    await pool.decode(1, lambda: None)
    gate.open.set()
    await next_
    assert gate.most == LARGE_AT_ONCE


async def test_places_are_bounded_and_given_back(pool: Threads) -> None:
    with pool.slot():
        pass
    places = [pool.slot() for _ in range(20)]
    for place in places:
        place.__enter__()
    with pytest.raises(QueueFull), pool.slot():
        raise AssertionError
    places[0].__exit__(None, None, None)
    with pool.slot():
        pass
