"""Threads for hashing and encoding, and places for requests whose images wait."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from underpaint_server.errors import QueueFull
from underpaint_server.rpc.threads import Threads


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[Threads]:
    pool = Threads(capacity=20)
    yield pool
    pool.close()


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
