from collections.abc import AsyncIterator

import pytest_asyncio
from support.front import Wire, started


@pytest_asyncio.fixture
async def wire() -> AsyncIterator[Wire]:
    """A started server on a socket."""
    async with started() as wire:
        yield wire
