"""How tests wait: for a condition, never for a time."""

import asyncio
from collections.abc import Callable
from typing import Any

PATIENCE_S = 300.0
"""How long anything may take on the slowest machine before a test gives up."""


async def until(condition: Callable[[], Any]) -> Any:
    """Wait for the condition to be true; what it gave then."""
    async with asyncio.timeout(PATIENCE_S):
        while not (found := condition()):
            await asyncio.sleep(0.002)
    return found
