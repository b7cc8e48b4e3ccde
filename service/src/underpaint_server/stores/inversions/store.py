"""The inversion store: entries that expire some time after their last use, and the least recently used of which give
way when the bytes run out.

Several replicas may share one place. Each keeps an index of what is there, asks the place itself before it says that
something is absent or expired, and looks at the whole place again before it removes anything.
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
from underpaint_server.telemetry import Metrics

_DEFAULT_PAGE = 50
_SWEEP_S = 60.0
_FRESH_S = 10.0
"""For so long after looking at the whole place, removing goes by the index alone."""
_USES_RECORDED_PER_TTL = 16
"""A use is put on record only when the one on record is older than this share of the TTL: a write, not one a read."""
_READS_AT_ONCE = 32

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one stored inversion without reading its latents."""

    name: str
    """64 hexadecimal digits, without ``inversions/``."""
    inversion: Inversion
    """Its ``arrays`` are empty."""
    fitting: Mapping[str, int]
    """What was done to the image to bring it to the model's size, as the caller of ``put`` gave it."""
    size_bytes: int
    create_time: datetime
    expire_time: datetime


Page = tuple[list[Entry], str]


class InversionStore:
    """Inversions by name, for many tasks of one event loop. Any call raises StoreUnavailable if the place is silent."""

    def __init__(
        self, objects: InversionFiles, *, max_bytes: int, ttl_s: float, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._objects = objects
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._metrics = metrics
        self._clock = clock
        self._index = Index()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._reads = asyncio.Semaphore(_READS_AT_ONCE)
        self._looked_at = float("-inf")
        self._sweeper: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        objects: ObjectStore,
        *,
        max_bytes: int,
        ttl_s: float,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """The inversions in an object store, with what is stored already: one small read an entry.

        Expired entries are removed in the background too, until :meth:`close` or the end of the event loop.
        """
        store = cls(InversionFiles(objects), max_bytes=max_bytes, ttl_s=ttl_s, metrics=metrics, clock=clock)
        await store._look_at_all()
        await store._make_room()
        metrics.watch_store(store)
        store._sweeper = asyncio.create_task(store._sweep())
        return store

    async def close(self) -> None:
        """Stop removing expired entries in the background; what is stored stays."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    @property
    def total_bytes(self) -> int:
        """Bytes of all entries, as last known."""
        return self._index.total_bytes

    @property
    def entries(self) -> int:
        """Number of entries, as last known."""
        return len(self._index)

    async def put(self, name: str, inversion: Inversion, fitting: Mapping[str, int], *, replace: bool = False) -> Entry:
        """Store an inversion, and let the least recently used ones go if it needs their bytes.

        A name stands for its content: one that is there already stays, unless ``replace`` (which keeps the creation
        time). Raises ImageTooLarge if it alone is larger than the whole store, ValueError for a malformed name.
        """
        if not NAME.fullmatch(name):
            raise ValueError(f"'{name}' is not 64 hexadecimal digits")
        async with self._lock(name):
            entry = await self._put(name, inversion, fitting, replace)
        await self._make_room()
        return entry

    async def get(self, name: str) -> tuple[Inversion, Entry]:
        """The inversion with its latents; moves its expiry. Raises InversionExpired, StoreCorrupt."""
        _, inversion, entry = await self._use(name)
        return inversion, entry

    async def head(self, name: str) -> Entry:
        """What is known of an inversion; moves nothing. Raises InversionExpired, StoreCorrupt."""
        _check(name)
        async with self._lock(name):
            kept = await self._look(name)
        if kept is None:
            raise _not_found(name)
        return self._entry(name, kept)

    async def export(self, name: str) -> bytes:
        """The safetensors file itself, verified; moves the expiry. Raises InversionExpired, StoreCorrupt."""
        data, _, _ = await self._use(name)
        return data

    async def delete(self, name: str) -> bool:
        """Remove an inversion; False if there was none."""
        if not NAME.fullmatch(name):
            return False
        async with self._lock(name):
            try:
                kept = await self._look(name)
            except StoreCorrupt:
                return True
            if kept is not None:
                await self._remove(name)
        return kept is not None

    async def list(self, page_size: int, page_token: str) -> Page:
        """A page of entries, newest first, and the token of the next page, "" on the last.

        Entries that come or go meanwhile move no other entry across pages. ``page_size`` 0 takes 50. Raises
        FieldInvalid for a token that is none of ours.
        """
        before = key_of(page_token) if page_token else None
        if before is None:
            await self._look_at_all()
            await self._make_room()
        keys = sorted(((kept.record.create_time, name) for name, kept in self._index.items()), reverse=True)
        left = keys if before is None else [key for key in keys if key < before]
        page = left[: page_size or _DEFAULT_PAGE]
        entries = [self._entry(name, kept) for _, name in page if (kept := self._index.get(name))]
        return entries, token_of(page[-1]) if len(left) > len(page) else ""

    # --- one entry; callers of the next three hold its lock ---------------------------------------------------------

    async def _put(self, name: str, inversion: Inversion, fitting: Mapping[str, int], replace: bool) -> Entry:
        try:
            there = await self._look(name)
        except StoreCorrupt:
            there = None
        if there is None or replace:
            now = self._clock()
            created = there.record.create_time if there else datetime.fromtimestamp(now, UTC)
            data = await asyncio.to_thread(encode, inversion, fitting, created)
            self._refuse_oversized(len(data))
            try:
                version = await self._objects.write(name, data, overwrite=replace)
                there = self._index.put(name, decode_record(data), Stat(len(data), version, now))
            except AlreadyExistsError:
                # Another replica was faster by a moment; the content is the same.
                there = await self._look(name)
                if there is None:
                    raise _not_found(name) from None
        await self._record_use(name, there)
        return self._entry(name, there)

    async def _look(self, name: str) -> IndexEntry | None:
        """The entry as it is in the place itself now; None if absent, or expired, and then it is removed."""
        try:
            head, stat = await self._objects.read_head(name)
            record = decode_record(head)
        except FileNotFoundError:
            self._index.drop(name)
            return None
        except StoreCorrupt as error:
            await self._remove(name)
            raise _damaged(name, error) from error
        kept = self._index.put(name, record, stat)
        if not self._expired(kept):
            return kept
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
            inversion, record = await asyncio.to_thread(decode, data)
        except FileNotFoundError:
            self._index.drop(name)
            self._metrics.on_store_request(result="expired" if known else "miss")
            raise _not_found(name) from None
        except StoreCorrupt as error:
            async with self._lock(name):
                await self._remove(name)
            raise _damaged(name, error) from error
        kept = self._index.put(name, record, stat)
        await self._record_use(name, kept)
        self._metrics.on_store_request(result="hit")
        return data, inversion, self._entry(name, kept)

    async def _read_unexpired(self, name: str) -> tuple[bytes, Stat]:
        kept = self._index.get(name)
        if kept is None or self._expired(kept):
            # Another replica may have written it, or used it since.
            async with self._lock(name):
                if await self._look(name) is None:
                    raise FileNotFoundError(name)
        # Before the read, not after: what is being read is not the least recently used.
        self._index.use(name, self._clock())
        return await self._objects.read(name)

    async def _record_use(self, name: str, kept: IndexEntry) -> None:
        now, on_record = self._clock(), kept.on_record_at
        self._index.use(name, now)
        if now - on_record < self._ttl_s / _USES_RECORDED_PER_TTL:
            return
        kept.on_record_at = now
        try:
            await self._objects.mark_used(name)
        except StoreUnavailable:
            # The worst that follows is that another replica lets it go early.
            _log.warning("a use could not be put on record", inversion=name)

    # --- the whole place ------------------------------------------------------------------------------------------

    async def _look_at_all(self) -> None:
        known = {name for name, _ in self._index.items()}
        found = await self._objects.scan()
        for name in known - found.keys():
            self._index.drop(name)
        changed = [name for name, stat in found.items() if self._changed(name, stat)]
        await asyncio.gather(*(self._learn(name) for name in changed))
        self._index.learn_uses(found)
        self._looked_at = self._clock()

    def _changed(self, name: str, stat: Stat) -> bool:
        kept = self._index.get(name)
        return kept is None or kept.stat.version != stat.version

    async def _learn(self, name: str) -> None:
        async with self._reads, self._lock(name):
            try:
                await self._look(name)
            except StoreCorrupt as error:
                _log.error("a stored inversion was damaged and has been removed", inversion=name, error=error.message)

    async def _make_room(self) -> None:
        if self._next_to_evict() is None:
            return
        if self._clock() - self._looked_at > _FRESH_S:
            await self._look_at_all()
        while (next_to_evict := self._next_to_evict()) is not None:
            await self._evict(*next_to_evict)

    def _next_to_evict(self) -> tuple[str, str] | None:
        oldest = self._index.oldest()
        if oldest is None:
            return None
        name, kept = oldest
        if self._expired(kept):
            return name, "ttl"
        return (name, "bytes") if self._index.total_bytes > self._max_bytes else None

    async def _evict(self, name: str, reason: str) -> None:
        self._index.drop(name)
        async with self._lock(name):
            if name not in self._index:  # else it was put again while we waited
                await self._objects.remove(name)
                self._metrics.on_eviction(reason=reason)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(self._ttl_s / 4, _SWEEP_S))
            try:
                await self._make_room()
            except StoreUnavailable:
                _log.warning("expired inversions could not be removed")

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _expired(self, kept: IndexEntry) -> bool:
        return kept.used_at + self._ttl_s < self._clock()

    def _entry(self, name: str, kept: IndexEntry) -> Entry:
        record = kept.record
        expire_time = datetime.fromtimestamp(kept.used_at + self._ttl_s, UTC)
        return Entry(name, record.inversion, record.fitting, kept.stat.size_bytes, record.create_time, expire_time)

    def _refuse_oversized(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise ImageTooLarge(
                f"the inversion takes {size_bytes} bytes and the whole store of this server holds {self._max_bytes}:"
                " invert a smaller image or take fewer steps",
                metadata={"limit": str(self._max_bytes), "actual": str(size_bytes)},
            )


def _check(name: str) -> None:
    if not NAME.fullmatch(name):
        raise _not_found(name)


def _not_found(name: str) -> InversionExpired:
    return InversionExpired(
        f"inversions/{name} does not exist, or no longer: invert the image again", metadata=_resource(name)
    )


def _damaged(name: str, error: StoreCorrupt) -> StoreCorrupt:
    return StoreCorrupt(
        f"inversions/{name} was damaged and has been removed: invert the image again ({error.message})",
        metadata=_resource(name),
    )


def _resource(name: str) -> dict[str, str]:
    return {"resource_type": "underpaint.v1.Inversion", "resource_name": f"inversions/{name}"}
