"""How many bytes of requests the calls in progress hold in memory, and the limit on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from underpaint_server.errors import QueueFull

_RETRY_S: Final = 1.0


class HeldBytes:
    """Bytes of the request messages of calls in progress; ``limit`` is the most that is held at one time.

    A message larger than the limit is accepted where no other is held.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held_bytes = 0
        """Bytes that are held now."""

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Hold a message of ``size`` bytes for the length of its call; raises QueueFull beyond the limit."""
        if self.held_bytes and self.held_bytes + size > self._limit:
            raise QueueFull(
                f"the images of other calls take {self.held_bytes} bytes of memory, and {size} more would exceed the"
                f" limit of {self._limit}; retry in a second",
                retry_after_s=_RETRY_S,
            )
        self.held_bytes += size
        try:
            yield
        finally:
            self.held_bytes -= size
