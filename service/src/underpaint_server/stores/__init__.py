"""Where inversions, directions, operations and answers are stored between requests: in memory, in files or in S3."""

import asyncio
from dataclasses import dataclass

from underpaint_server.settings import Settings
from underpaint_server.stores.blobs import Blobs
from underpaint_server.stores.directions import DirectionStore
from underpaint_server.stores.inversions.digest import inversion_digest
from underpaint_server.stores.inversions.store import Entry, InversionStore
from underpaint_server.stores.operations import OperationStore
from underpaint_server.stores.replays import ReplayStore
from underpaint_server.stores.urls import is_shared, open_store
from underpaint_server.telemetry import Metrics, in_background

__all__ = ["DirectionStore", "Entry", "InversionStore", "OperationStore", "ReplayStore", "Stores", "inversion_digest"]


@dataclass(frozen=True, slots=True)
class Stores:
    """All stores of the server, in one object store."""

    inversions: InversionStore
    directions: DirectionStore
    operations: OperationStore
    replays: ReplayStore | None
    """None where no other server can read the object store, or no answers are to be kept."""
    background: tuple[asyncio.Task[None], ...]
    """Count the directions, and remove expired answers."""

    @classmethod
    async def open(cls, settings: Settings, metrics: Metrics) -> "Stores":
        """Open the object store at ``settings.store_url`` and read the index of the inversions in it.

        Raises ValueError for an unsupported or malformed URL; StoreUnavailable, or an error of the obstore library, if
        the object store cannot be reached.
        """
        store = open_store(settings.store_url)
        blobs = Blobs(store)
        inversions = await InversionStore.open(
            store,
            max_bytes=settings.store_bytes,
            max_entry_bytes=settings.max_inversion_bytes,
            ttl_s=settings.store_ttl_s,
            metrics=metrics,
        )
        directions = DirectionStore(blobs, max_entries=settings.max_directions, max_bytes=settings.max_directions_bytes)
        metrics.watch_directions(directions)
        background = [in_background(directions.measure_repeatedly())]
        replays = None
        if settings.replay_bytes and is_shared(settings.store_url):
            replays = ReplayStore(blobs, ttl_s=settings.replay_ttl_s, max_bytes=settings.replay_bytes)
            background.append(in_background(replays.sweep_repeatedly()))
        return cls(inversions, directions, OperationStore(blobs), replays, tuple(background))

    async def close(self) -> None:
        """Stop the work in the background. Stored objects stay."""
        for task in self.background:
            task.cancel()
        await asyncio.gather(*self.background, return_exceptions=True)
        await self.inversions.close()
