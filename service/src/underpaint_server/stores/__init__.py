"""Where inversions, directions and operations are stored between requests: in memory, in files or in S3."""

from dataclasses import dataclass

from underpaint_server.settings import Settings
from underpaint_server.stores.blobs import Blobs
from underpaint_server.stores.directions import DirectionStore
from underpaint_server.stores.inversions.digest import inversion_digest
from underpaint_server.stores.inversions.store import Entry, InversionStore
from underpaint_server.stores.operations import OperationStore
from underpaint_server.stores.urls import open_store
from underpaint_server.telemetry import Metrics

__all__ = ["DirectionStore", "Entry", "InversionStore", "OperationStore", "Stores", "inversion_digest"]


@dataclass(frozen=True, slots=True)
class Stores:
    """Everything that is stored, behind one URL."""

    inversions: InversionStore
    directions: DirectionStore
    operations: OperationStore

    @classmethod
    async def open(cls, settings: Settings, metrics: Metrics) -> "Stores":
        """Open ``settings.store_url``, once.

        Raises ValueError for a URL that means nothing, StoreUnavailable or an error of the library for one that cannot
        be reached.
        """
        store = open_store(settings.store_url)
        blobs = Blobs(store)
        inversions = await InversionStore.open(
            store, max_bytes=settings.store_bytes, ttl_s=settings.store_ttl_s, metrics=metrics
        )
        return cls(inversions, DirectionStore(blobs), OperationStore(blobs))

    async def close(self) -> None:
        """Stop removing expired inversions in the background; what is stored stays."""
        await self.inversions.close()
