"""Where inversions, directions and operations are stored between requests: in memory, in files or in S3."""

import asyncio
from dataclasses import dataclass

from underpaint_server.settings import Settings
from underpaint_server.stores.blobs import Blobs
from underpaint_server.stores.directions import DirectionStore
from underpaint_server.stores.inversions.digest import inversion_digest
from underpaint_server.stores.inversions.store import Entry, InversionStore
from underpaint_server.stores.operations import OperationStore
from underpaint_server.stores.urls import open_store
from underpaint_server.telemetry import Metrics, in_background

__all__ = ["DirectionStore", "Entry", "InversionStore", "OperationStore", "Stores", "inversion_digest"]


@dataclass(frozen=True, slots=True)
class Stores:
    """All stores of the server, in one object store."""

    inversions: InversionStore
    directions: DirectionStore
    operations: OperationStore
    measuring: asyncio.Task[None]
    """Counts the directions in the background."""

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
        measuring = in_background(directions.measure_repeatedly())
        return cls(inversions, directions, OperationStore(blobs), measuring)

    async def close(self) -> None:
        """Stop the work in the background. Stored objects stay."""
        self.measuring.cancel()
        await asyncio.gather(self.measuring, return_exceptions=True)
        await self.inversions.close()
