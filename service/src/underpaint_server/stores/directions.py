"""The direction store: one safetensors file a direction, ``directions/{id}.safetensors``, kept until it is deleted.

The file's only tensor is ``weights``, float32 of shape (steps,). Everything else is in its record, see ``codec``. The
file's checksum is the direction's etag. The file does not name the direction, since it may be imported under another
name; so the object is the file *sealed* for its path, see ``blobs``.
"""

import asyncio
import json
import math
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

import numpy as np
import structlog
from pydantic import TypeAdapter, ValidationError

from underpaint_server.errors import (
    DirectionExists,
    DirectionNotFound,
    DirectionsFull,
    EtagMismatch,
    StoreCorrupt,
    StoreUnavailable,
)
from underpaint_server.jobs import MAX_GUIDANCE_SCALE, MAX_MIXING_WEIGHT, Direction, LearnOptions
from underpaint_server.stores import codec
from underpaint_server.stores.blobs import Blob, Blobs, is_sealed, sealed, unsealed
from underpaint_server.stores.paging import key_of, token_of
from underpaint_server.telemetry import report_unexpected

NAME: Final = re.compile(r"[a-z0-9-]{1,63}")
"""The form of a direction's id."""
MAX_BYTES: Final = 256 * 1024
"""Largest size of one file in bytes. A direction of 1000 steps takes less than half of it."""
FORMAT: Final = 2
"""Version of the files that are written."""
_UNNAMED: Final = 1
"""The previous version, still read: its checksum does not cover the name of the tensor."""

_FOLDER: Final = "directions"
_OBJECT: Final = re.compile(rf"{_FOLDER}/({NAME.pattern})\.safetensors")
_READS_AT_ONCE: Final = 32
_MEASURE_S: Final = 60.0
_MAX_NUMBERS: Final = 1000
"""Most weights, losses or examples in a file. Learning here needs far fewer."""
_MAX_NAME_CHARS: Final = 1000
_TIMES: Final = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)
"""Earliest and latest create_time. Times beyond these overflow in some libraries when the time zone is converted."""

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored direction."""

    name: str
    """The id, without ``directions/``."""
    direction: Direction
    create_time: datetime
    etag: str
    """SHA-256 checksum of the file, hexadecimal."""


Entries = list[Entry]


@dataclass(frozen=True, slots=True)
class _Record:
    """The JSON record of a file, without its checksum."""

    format: int
    display_name: str
    model: str
    model_digest: str
    options: LearnOptions
    losses: tuple[float, ...]
    content_features: str
    example_count: int
    operation: str
    create_time: datetime


_RECORD: Final = TypeAdapter(_Record)


def encode(direction: Direction, create_time: datetime) -> bytes:
    """The safetensors file. Equal arguments give equal bytes."""
    record = _Record(
        FORMAT,
        direction.display_name,
        direction.model,
        direction.model_digest,
        direction.options,
        direction.losses,
        direction.content_features,
        direction.example_count,
        direction.operation,
        create_time,
    )
    values = json.loads(_RECORD.dump_json(record))
    return codec.encode(values, {"weights": np.array(direction.weights, np.float32)})


def decode(name: str, data: bytes) -> Entry:
    """Read a file that is not trusted; raises StoreCorrupt if it is malformed, damaged or has values out of range."""
    file = codec.decode(data, named=codec.read_record(data).get("format") != _UNNAMED)
    try:
        record = _RECORD.validate_json(json.dumps(file.record), strict=True)
        weights = file.arrays["weights"]
    except (ValidationError, ValueError, KeyError) as error:
        raise StoreCorrupt(f"not the file of a direction: {_first_line(error)}") from error
    direction = Direction(
        display_name=record.display_name,
        model=record.model,
        model_digest=record.model_digest,
        options=record.options,
        weights=tuple(weights.astype(float).tolist()) if weights.dtype == np.float32 and weights.ndim == 1 else (),
        losses=record.losses,
        content_features=record.content_features,
        example_count=record.example_count,
        operation=record.operation,
    )
    _check(record, direction)
    _check_known(record, file)
    return Entry(name, direction, record.create_time, file.sha256)


def renamed(data: bytes, display_name: str) -> bytes:
    """The same file with another display name, and so another etag; raises StoreCorrupt."""
    entry = decode("", data)
    return encode(replace(entry.direction, display_name=display_name), entry.create_time)


class DirectionStore:
    """Directions by id. Any method raises StoreUnavailable if the object store cannot be reached.

    ``max_entries`` and ``max_bytes`` limit what :meth:`check_room` lets callers add.
    """

    def __init__(
        self, blobs: Blobs, *, max_entries: int, max_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._blobs = blobs
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self.entries = self.total_bytes = 0
        """Number and size in bytes of all stored directions, when they were last counted."""
        self._clock = clock
        self._cache: dict[str, tuple[str | None, Entry]] = {}
        """Entries that a listing has read, by id, each with the version of the object that was read."""
        self._reads = asyncio.Semaphore(_READS_AT_ONCE)

    async def create(self, name: str, direction: Direction) -> Entry:
        """Store a new direction; raises DirectionExists."""
        return await self.create_from_file(name, encode(direction, datetime.fromtimestamp(self._clock(), UTC)))

    async def create_from_file(self, name: str, data: bytes) -> Entry:
        """Store a file unchanged; raises DirectionExists, and StoreCorrupt as :func:`decode` does."""
        entry, data = decode(name, data), sealed(_path(name), data)
        if not await self._blobs.create(_path(name), data):
            raise DirectionExists(f"directions/{name} exists already; choose another id", metadata=_resource(name))
        self.entries += 1
        self.total_bytes += len(data)
        return entry

    async def check_room(self, entries: int, size_bytes: int = 0) -> None:
        """Raise DirectionsFull if there is no room for so many more directions, of ``size_bytes`` together."""
        await self.measure()
        entries, size_bytes = entries + self.entries, size_bytes + self.total_bytes
        if entries > self._max_entries or size_bytes > self._max_bytes:
            raise DirectionsFull(
                f"there would be {entries} directions of {size_bytes} bytes, more than the limits of"
                f" {self._max_entries} directions and {self._max_bytes} bytes: delete some",
                metadata={"entries": str(self.entries), "bytes": str(self.total_bytes)},
            )

    async def measure(self) -> None:
        """Count the stored directions and their bytes."""
        blobs = (await self._stored()).values()
        self.entries, self.total_bytes = len(blobs), sum(blob.size_bytes for blob in blobs)

    async def measure_repeatedly(self) -> None:
        """Count them every minute: other servers of the store add and delete some."""
        while True:
            try:
                await self.measure()
            except StoreUnavailable:
                pass  # logged by the store
            except Exception as error:
                report_unexpected("stored directions are not counted", error)
            await asyncio.sleep(_MEASURE_S)

    async def get(self, name: str) -> Entry:
        """One direction. Raises DirectionNotFound, StoreCorrupt."""
        return (await self._read(name))[1]

    async def exists(self, name: str) -> bool:
        """Whether a direction has this id."""
        return await self._blobs.exists(_path(name))

    async def export(self, name: str) -> bytes:
        """The bytes of the file, verified. Raises DirectionNotFound, StoreCorrupt."""
        return (await self._read(name))[0]

    async def _read(self, name: str) -> tuple[bytes, Entry]:
        data = await self._blobs.read(_path(name))
        if data is None:
            raise _missing(name)
        try:
            if is_sealed(data):  # earlier versions wrote the file alone
                data = unsealed(_path(name), data)
            return data, decode(name, data)
        except StoreCorrupt as error:
            raise StoreCorrupt(
                f"directions/{name} is damaged: delete it, then learn or import it again ({error.message})",
                metadata=_resource(name),
            ) from error

    async def delete(self, name: str, etag: str = "") -> None:
        """Remove a direction; with an ``etag``, only if the direction has it.

        Raises DirectionNotFound and EtagMismatch. A damaged file can be removed only without an etag: with one,
        StoreCorrupt is raised.
        """
        # Another writer may replace the direction between the check and the removal only by deleting and creating it.
        if etag and (await self.get(name)).etag != etag:
            raise EtagMismatch(
                f"directions/{name} has another etag; read it again and retry with the new etag",
                metadata=_resource(name),
            )
        if not await self.exists(name) or not await self._blobs.remove(_path(name)):
            raise _missing(name)
        with suppress(StoreUnavailable):  # it is deleted, and counted again within a minute
            await self.measure()

    async def list(self, page_size: int, page_token: str) -> tuple[Entries, str]:
        """One page, newest first, and the token of the next page, "" on the last one.

        Raises FieldInvalid for a malformed token. Damaged files are logged and left out.
        """
        before = key_of(page_token) if page_token else None
        entries = sorted(await self._all(), key=lambda entry: (entry.create_time, entry.name), reverse=True)
        left = [entry for entry in entries if before is None or (entry.create_time, entry.name) < before]
        page = left[:page_size]
        return page, token_of((page[-1].create_time, page[-1].name)) if len(left) > len(page) else ""

    async def _all(self) -> Entries:
        blobs = await self._stored()
        self._cache = {name: cached for name, cached in self._cache.items() if name in blobs}
        changed = [(name, blob.version) for name, blob in blobs.items() if not self._is_cached(name, blob.version)]
        await asyncio.gather(*(self._load(name, version) for name, version in changed))
        return [entry for name, (_, entry) in self._cache.items() if name in blobs]

    async def _stored(self) -> dict[str, Blob]:
        """The objects of all directions, by id."""
        return {match[1]: blob for blob in await self._blobs.below(_FOLDER) if (match := _OBJECT.fullmatch(blob.path))}

    def _is_cached(self, name: str, version: str | None) -> bool:
        cached = self._cache.get(name)
        return cached is not None and version is not None and cached[0] == version

    async def _load(self, name: str, version: str | None) -> None:
        async with self._reads:
            try:
                self._cache[name] = (version, await self.get(name))
            except DirectionNotFound:
                self._cache.pop(name, None)
            except StoreCorrupt as error:
                self._cache.pop(name, None)
                _log.error("stored direction damaged", direction=name, error=error.message)


def _check(record: _Record, direction: Direction) -> None:
    weights, steps = direction.weights, direction.options.num_inference_steps
    numbers = (*weights, *record.losses, direction.options.guidance_scale)
    if record.format not in (_UNNAMED, FORMAT):
        raise StoreCorrupt(f"the file has format {record.format}; this server reads formats {_UNNAMED} and {FORMAT}")
    if not weights or len(weights) != steps:
        raise StoreCorrupt(f"the file has {len(weights)} weights for {steps} steps")
    if not all(math.isfinite(number) for number in numbers) or max(map(abs, weights)) > MAX_MIXING_WEIGHT:
        raise StoreCorrupt(
            "a number in the file is not finite, or a weight is outside"
            f" [-{MAX_MIXING_WEIGHT:g}, {MAX_MIXING_WEIGHT:g}]"
        )
    if not direction.options.source_prompt.strip() or not direction.options.target_prompt.strip():
        raise StoreCorrupt("the source prompt or the target prompt in the file is empty")
    if record.create_time.tzinfo is None or not _TIMES[0] <= record.create_time < _TIMES[1]:
        raise StoreCorrupt("the file's create_time has no time zone, or is outside the years 1970..9998")
    if not 0 <= direction.options.guidance_scale <= MAX_GUIDANCE_SCALE:
        raise StoreCorrupt(f"the file's guidance_scale is outside [0, {MAX_GUIDANCE_SCALE:g}]")
    if max(len(weights), len(record.losses), record.example_count) > _MAX_NUMBERS or record.example_count < 0:
        raise StoreCorrupt(f"the number of weights, losses or examples in the file is outside [0, {_MAX_NUMBERS}]")
    names = record.display_name, record.model, record.model_digest, record.content_features, record.operation
    if max(map(len, names)) > _MAX_NAME_CHARS:
        raise StoreCorrupt(f"a name in the file has more than {_MAX_NAME_CHARS} characters")


def _check_known(record: _Record, file: codec.File) -> None:
    """Raise StoreCorrupt for tensors and members of the record that mean nothing here."""
    known = json.loads(_RECORD.dump_json(record)) | {"create_time": file.record["create_time"]}
    if file.arrays.keys() != {"weights"} or known != file.record:
        raise StoreCorrupt("the file has more than a direction: another tensor, or another member of its record")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _path(name: str) -> str:
    return f"{_FOLDER}/{name}.safetensors"


def _missing(name: str) -> DirectionNotFound:
    return DirectionNotFound(f"directions/{name} does not exist", metadata=_resource(name))


def _resource(name: str) -> dict[str, str]:
    return {"resource_type": "underpaint.v1.Direction", "resource_name": f"directions/{name}"}
