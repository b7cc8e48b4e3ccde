"""Inversions as objects: ``inversions/{name}.safetensors``, each with an empty ``inversions/{name}.used``.

The modification time of the ``.used`` object is the time of the inversion's last use, for all replicas that share the
store and after a restart. It is an object of its own because a modification time changes only by writing the object.
"""

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore

from underpaint_server.stores.blobs import reaching
from underpaint_server.stores.codec import header_bytes

if TYPE_CHECKING:
    from obstore import ObjectMeta  # the library defines it for type checkers only

NAME = re.compile(r"[0-9a-f]{64}")
"""The form of an inversion's name: 64 lower-case hexadecimal digits."""

_FOLDER = "inversions"
_DATA, _USED = ".safetensors", ".used"
_OBJECT = re.compile(rf"{_FOLDER}/({NAME.pattern})({re.escape(_DATA)}|{re.escape(_USED)})")
_HEAD_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Stat:
    """What a listing of the object store says of one inversion."""

    size_bytes: int
    """Size of the file."""
    version: str | None
    """The object's ETag, which changes when the object is replaced; None where the store has none."""
    used_at: float
    """Unix time in seconds of the last recorded use, or of the writing if that is later."""


class InversionFiles:
    """Reads and writes the objects of inversions.

    Reading raises FileNotFoundError for a missing inversion. Any method raises StoreUnavailable if the object store
    cannot be reached.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def read(self, name: str) -> tuple[bytes, Stat]:
        """The whole file; ``used_at`` is the time it was written."""
        with reaching():
            result = await obstore.get_async(self._store, _path(name, _DATA))
            data = bytes(await result.bytes_async())
            return data, _stat(result.meta)

    async def read_head(self, name: str) -> tuple[bytes, Stat]:
        """The start of the file with at least the whole header, and the last recorded use."""
        with reaching():
            head, stat = await self._head_of(_path(name, _DATA))
            return head, await self._with_use(name, stat)

    async def _head_of(self, path: str) -> tuple[bytes, Stat]:
        try:
            result = await obstore.get_async(self._store, path, options={"range": (0, _HEAD_BYTES)})
        except BaseError:
            # A range of an empty object is an error. A full disk or a power failure may leave an empty object.
            stat = _stat(await obstore.head_async(self._store, path))
            if stat.size_bytes:
                raise
            return b"", stat
        head, stat = bytes(await result.bytes_async()), _stat(result.meta)
        needed = min(header_bytes(head), stat.size_bytes)
        if needed > len(head):
            head = bytes(await obstore.get_range_async(self._store, path, start=0, end=needed))
        return head, stat

    async def write(self, name: str, data: bytes, *, overwrite: bool) -> str | None:
        """Write the file atomically and return its version; raises AlreadyExistsError unless ``overwrite``."""
        mode: Literal["overwrite", "create"] = "overwrite" if overwrite else "create"
        path = _path(name, _DATA)
        with reaching():
            result = await obstore.put_async(self._store, path, data, mode=mode, use_multipart=False)
        return result["e_tag"]

    async def mark_used(self, name: str) -> None:
        """Record the current time as the last use."""
        with reaching():
            await obstore.put_async(self._store, _path(name, _USED), b"")

    async def remove(self, name: str) -> None:
        """Remove the file and its ``.used`` object; a missing one is no error."""
        for kind in (_DATA, _USED):
            with reaching(), suppress(FileNotFoundError):
                await obstore.delete_async(self._store, _path(name, kind))

    async def scan(self) -> dict[str, Stat]:
        """All inversions in the object store, by name. Objects of other kinds are ignored."""
        files: dict[str, Stat] = {}
        uses: dict[str, float] = {}
        with reaching():
            async for chunk in obstore.list(self._store, _FOLDER, chunk_size=1000):
                for meta in chunk:
                    match = _OBJECT.fullmatch(meta["path"])
                    if match is None:
                        continue
                    if match[2] == _DATA:
                        files[match[1]] = _stat(meta)
                    else:
                        uses[match[1]] = meta["last_modified"].timestamp()
        return {name: _used(stat, uses.get(name, 0.0)) for name, stat in files.items()}

    async def _with_use(self, name: str, stat: Stat) -> Stat:
        try:
            meta = await obstore.head_async(self._store, _path(name, _USED))
        except FileNotFoundError:
            return stat
        return _used(stat, meta["last_modified"].timestamp())


def _path(name: str, kind: str) -> str:
    return f"{_FOLDER}/{name}{kind}"


def _stat(meta: "ObjectMeta") -> Stat:
    return Stat(meta["size"], meta["e_tag"], meta["last_modified"].timestamp())


def _used(stat: Stat, at: float) -> Stat:
    return replace(stat, used_at=max(stat.used_at, at))
