"""Inversions by name: entries expire some time after their last use, and the least recently used are evicted.

Several replicas may share one object store. Each keeps an index of the entries. It reads the object itself before it
reports an inversion as missing or expired, and lists the whole store again before it evicts anything.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self
from weakref import WeakValueDictionary

import structlog
from obstore.exceptions import AlreadyExistsError
from obstore.store import ObjectStore

from underpaint_server.errors import ImageTooLarge, InversionExpired, StoreCorrupt, StoreUnavailable
from underpaint_server.jobs import Inversion
from underpaint_server.stores.inversions.files import NAME, InversionFiles, Stat
from underpaint_server.stores.inversions.index import Index, IndexEntry
from underpaint_server.stores.inversions.record import decode, decode_record, encode
from underpaint_server.stores.paging import key_of, token_of
from underpaint_server.telemetry import Metrics, in_background, report_unexpected

_DEFAULT_PAGE = 50
_SWEEP_S = 60.0
_FRESH_S = 10.0
"""For this many seconds after a listing of the whole store, eviction trusts the index."""
_USES_RECORDED_PER_TTL = 16
"""A use is recorded only if the recorded one is older than the TTL divided by this, so that few reads cause a write."""
_READS_AT_ONCE = 32
_LARGE = 256
"""An inversion that takes more than the store's limit divided by this is large."""

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored inversion without its latents."""

    name: str
    """64 hexadecimal digits, without ``inversions/``."""
    inversion: Inversion
    """Without arrays: its ``arrays`` are empty."""
    fitting: Mapping[str, int]
    """How the image was fitted to the model's size: the fields of ``wire.fitting.Fitting``, as given to ``put``."""
    size_bytes: int
    """Size of the file."""
    create_time: datetime
    expire_time: datetime
    """Unless the inversion is used before."""


Page = tuple[list[Entry], str]
"""Entries, and the token of the next page."""


class InversionStore:
    """Inversions by name, for many tasks of one event loop.

    Any method raises StoreUnavailable if the object store cannot be reached.
    """

    def __init__(
        self,
        objects: InversionFiles,
        *,
        max_bytes: int,
        max_entry_bytes: int,
        ttl_s: float,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._objects = objects
        self._max_bytes = max_bytes
        self._max_entry_bytes = min(max_bytes, max_entry_bytes)
        self._ttl_s = ttl_s
        self._metrics = metrics
        self._clock = clock
        self._index = Index(large_bytes=max_bytes // _LARGE)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._reads = asyncio.Semaphore(_READS_AT_ONCE)
        self._refreshed_at = float("-inf")
        self._sweeper: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        objects: ObjectStore,
        *,
        max_bytes: int,
        max_entry_bytes: int,
        ttl_s: float,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """A store over ``objects``; reads the header of every entry that exists.

        ``max_bytes`` bounds the sum of all files, ``max_entry_bytes`` each of them. ``ttl_s`` is how many seconds after
        its last use an entry expires, ``clock`` gives Unix time in seconds. Expired entries are also removed in the
        background, until :meth:`close` or the end of the event loop.
        """
        store = cls(
            InversionFiles(objects),
            max_bytes=max_bytes,
            max_entry_bytes=max_entry_bytes,
            ttl_s=ttl_s,
            metrics=metrics,
            clock=clock,
        )
        await store._refresh_all()
        await store._make_room()
        metrics.watch_store(store)
        store._sweeper = in_background(store._sweep())
        return store

    async def close(self) -> None:
        """Stop removing expired entries in the background. Stored entries stay."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    @property
    def total_bytes(self) -> int:
        """Size of all entries in bytes, by the index."""
        return self._index.total_bytes

    @property
    def entries(self) -> int:
        """Number of entries, by the index."""
        return len(self._index)

    async def put(self, name: str, inversion: Inversion, fitting: Mapping[str, int], *, replace: bool = False) -> Entry:
        """Store an inversion, and evict the least recently used ones if the store is then too large.

        A name is a digest of what determines the content, so an existing entry is kept and only counted as used;
        ``replace`` overwrites it and keeps its creation time. Raises ImageTooLarge if the inversion is larger than one
        may be, ValueError for a malformed name.
        """
        if not NAME.fullmatch(name):
            raise ValueError(f"'{name}' is not 64 hexadecimal digits")
        async with self._lock(name):
            entry = await self._put(name, inversion, fitting, replace)
        await self._make_room()
        return entry

    async def get(self, name: str) -> tuple[Inversion, Entry]:
        """The inversion with its latents. Counts as a use. Raises InversionExpired, StoreCorrupt."""
        _, inversion, entry = await self._use(name)
        return inversion, entry

    async def head(self, name: str) -> Entry:
        """An inversion without its latents. Does not count as a use. Raises InversionExpired, StoreCorrupt."""
        _check(name)
        async with self._lock(name):
            indexed = await self._refresh(name)
        if indexed is None:
            raise _not_found(name)
        return self._entry(name, indexed)

    async def export(self, name: str) -> bytes:
        """The bytes of the file, verified. Counts as a use. Raises InversionExpired, StoreCorrupt."""
        data, _, _ = await self._use(name)
        return data

    async def delete(self, name: str) -> bool:
        """Remove an inversion, also a damaged one; False if it did not exist."""
        if not NAME.fullmatch(name):
            return False
        async with self._lock(name):
            try:
                indexed = await self._refresh(name)
            except StoreCorrupt:
                return True
            if indexed is not None:
                await self._remove(name)
        return indexed is not None

    async def list(self, page_size: int, page_token: str) -> Page:
        """One page of entries, newest first, and the token of the next page, "" on the last one.

        Entries added or removed between two pages move no other entry across pages. ``page_size`` 0 means 50. Raises
        FieldInvalid for a malformed token.
        """
        before = key_of(page_token) if page_token else None
        if before is None:
            await self._refresh_all()
            await self._make_room()
        keys = sorted(((indexed.record.create_time, name) for name, indexed in self._index.items()), reverse=True)
        left = keys if before is None else [key for key in keys if key < before]
        page = left[: page_size or _DEFAULT_PAGE]
        entries = [self._entry(name, indexed) for _, name in page if (indexed := self._index.get(name))]
        return entries, token_of(page[-1]) if len(left) > len(page) else ""

    # --- one entry; callers of the next three hold its lock ---------------------------------------------------------

    async def _put(self, name: str, inversion: Inversion, fitting: Mapping[str, int], replace: bool) -> Entry:
        try:
            stored = await self._refresh(name)
        except StoreCorrupt:
            stored = None
        if stored is None or replace:
            now = self._clock()
            created = stored.record.create_time if stored else datetime.fromtimestamp(now, UTC)
            data = await asyncio.to_thread(encode, name, inversion, fitting, created)
            self._refuse_oversized(len(data))
            try:
                version = await self._objects.write(name, data, overwrite=replace)
                stored = self._index.put(name, decode_record(name, data), Stat(len(data), version, now))
            except AlreadyExistsError:
                # Another replica wrote it meanwhile, with the same content.
                stored = await self._refresh(name)
                if stored is None:
                    raise _not_found(name) from None
        await self._record_use(name, stored)
        return self._entry(name, stored)

    async def _refresh(self, name: str) -> IndexEntry | None:
        """Read an entry from the object store into the index; None if missing or expired. An expired one is removed."""
        try:
            head, stat = await self._objects.read_head(name)
            record = decode_record(name, head)
        except FileNotFoundError:
            self._index.drop(name)
            return None
        except StoreCorrupt as error:
            await self._remove(name)
            raise _damaged(name, error) from error
        indexed = self._index.put(name, record, stat)
        if not self._expired(indexed):
            return indexed
        await self._remove(name)
        self._metrics.on_eviction(reason="ttl")
        return None

    async def _remove(self, name: str) -> None:
        self._index.drop(name)
        await self._objects.remove(name)

    # --- using an entry -------------------------------------------------------------------------------------------

    async def _use(self, name: str) -> tuple[bytes, Inversion, Entry]:
        _check(name)
        known = name in self._index
        try:
            data, stat = await self._read_unexpired(name)
            inversion, record = await asyncio.to_thread(decode, name, data)
        except FileNotFoundError:
            self._index.drop(name)
            self._metrics.on_store_request(result="expired" if known else "miss")
            raise _not_found(name) from None
        except StoreCorrupt as error:
            async with self._lock(name):
                await self._remove(name)
            raise _damaged(name, error) from error
        indexed = self._index.put(name, record, stat)
        await self._record_use(name, indexed)
        self._metrics.on_store_request(result="hit")
        return data, inversion, self._entry(name, indexed)

    async def _read_unexpired(self, name: str) -> tuple[bytes, Stat]:
        indexed = self._index.get(name)
        if indexed is None or self._expired(indexed):
            # Another replica may have written or used it since the last listing.
            async with self._lock(name):
                if await self._refresh(name) is None:
                    raise FileNotFoundError(name)
        # Before the read, so that the entry is not evicted as the least recently used meanwhile.
        self._index.use(name, self._clock())
        return await self._objects.read(name)

    async def _record_use(self, name: str, indexed: IndexEntry) -> None:
        now, on_record = self._clock(), indexed.on_record_at
        self._index.use(name, now)
        if now - on_record < self._ttl_s / _USES_RECORDED_PER_TTL:
            return
        indexed.on_record_at = now
        try:
            await self._objects.mark_used(name)
        except StoreUnavailable:
            # At worst another replica evicts the entry too early.
            _log.warning("use of inversion not recorded", inversion=name)

    # --- the whole store ------------------------------------------------------------------------------------------

    async def _refresh_all(self) -> None:
        known = {name for name, _ in self._index.items()}
        stats = await self._objects.scan()
        for name in known - stats.keys():
            self._index.drop(name)
        changed = [name for name, stat in stats.items() if self._changed(name, stat)]
        await asyncio.gather(*(self._refresh_changed(name) for name in changed))
        self._index.learn_uses(stats)
        self._refreshed_at = self._clock()

    def _changed(self, name: str, stat: Stat) -> bool:
        indexed = self._index.get(name)
        return indexed is None or indexed.stat.version != stat.version

    async def _refresh_changed(self, name: str) -> None:
        async with self._reads, self._lock(name):
            try:
                await self._refresh(name)
            except StoreCorrupt as error:
                _log.error("damaged inversion removed", inversion=name, error=error.message)

    async def _make_room(self) -> None:
        if self._next_to_evict() is None:
            return
        if self._clock() - self._refreshed_at > _FRESH_S:
            await self._refresh_all()
        while (next_to_evict := self._next_to_evict()) is not None:
            await self._evict(*next_to_evict)

    def _next_to_evict(self) -> tuple[str, str] | None:
        oldest = self._index.oldest()
        if oldest is None:
            return None
        name, indexed = oldest
        if self._expired(indexed):
            return name, "ttl"
        if self._index.total_bytes <= self._max_bytes:
            return None
        # A few large inversions must not evict the many small ones, nor these the large ones: in a full store each kind
        # keeps half of the bytes.
        large = self._index.total_large_bytes > self._max_bytes / 2
        oldest = self._index.oldest(large=large)
        if oldest is not None and oldest[0] == self._index.newest:
            # It alone takes more than half, and its caller has just been given its name.
            oldest = self._index.oldest(large=not large) or oldest  # none but it, where the limit was lowered
        assert oldest is not None
        return oldest[0], "bytes"

    async def _evict(self, name: str, reason: str) -> None:
        self._index.drop(name)
        async with self._lock(name):
            if name not in self._index:  # it may have been stored again while this task waited for the lock
                await self._objects.remove(name)
                self._metrics.on_eviction(reason=reason)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(self._ttl_s / 4, _SWEEP_S))
            try:
                await self._make_room()
            except StoreUnavailable:
                _log.warning("expired inversions not removed: object store unreachable")
            except Exception as error:
                report_unexpected("expired inversions not removed", error)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _expired(self, indexed: IndexEntry) -> bool:
        return indexed.used_at + self._ttl_s < self._clock()

    def _entry(self, name: str, indexed: IndexEntry) -> Entry:
        record = indexed.record
        expire_time = datetime.fromtimestamp(indexed.used_at + self._ttl_s, UTC)
        return Entry(name, record.inversion, record.fitting, indexed.stat.size_bytes, record.create_time, expire_time)

    def _refuse_oversized(self, size_bytes: int) -> None:
        if size_bytes > self._max_entry_bytes:
            raise ImageTooLarge(
                f"the inversion takes {size_bytes} bytes, more than the limit of {self._max_entry_bytes}: invert a"
                " smaller image, use fewer steps, or keep fewer features",
                metadata={"unit": "bytes", "limit": str(self._max_entry_bytes), "actual": str(size_bytes)},
            )


def _check(name: str) -> None:
    if not NAME.fullmatch(name):
        raise _not_found(name)


def _not_found(name: str) -> InversionExpired:
    return InversionExpired(
        f"inversions/{name} does not exist or has expired: invert the image again", metadata=_resource(name)
    )


def _damaged(name: str, error: StoreCorrupt) -> StoreCorrupt:
    return StoreCorrupt(
        f"inversions/{name} was damaged and is removed: invert the image again ({error.message})",
        metadata=_resource(name),
    )


def _resource(name: str) -> dict[str, str]:
    return {"resource_type": "underpaint.v1.Inversion", "resource_name": f"inversions/{name}"}
