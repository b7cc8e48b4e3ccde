"""Where inversions, directions and operations live between requests: one place, in memory, files or S3."""

from underpaint_server.stores.inversions import Entry, InversionStore
from underpaint_server.stores.urls import STORES, open_store

__all__ = ["STORES", "Entry", "InversionStore", "open_store"]
