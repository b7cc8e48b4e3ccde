"""Answers to requests with a request id, kept for a repeat that comes to another server of the same store.

The object ``replays/{request_id}`` has the fingerprint of the request and the answer's bytes. It is created once and
never replaced, and it is removed some time after it was written, or when all of them take too much room.
"""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from underpaint_server.errors import StoreCorrupt, StoreUnavailable
from underpaint_server.stores.blobs import Blob, Blobs, sealed, unsealed
from underpaint_server.telemetry import report_unexpected

MAX_ENTRIES: Final = 10_000
"""Most answers that are kept."""

_FOLDER: Final = "replays"
_OBJECT: Final = re.compile(rf"{_FOLDER}/[0-9a-f-]{{36}}")
_FINGERPRINT_BYTES: Final = 32
_SWEEP_S: Final = 60.0

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Replay:
    """A kept answer."""

    fingerprint: bytes
    """Of the request, 32 bytes; a repeat has the same."""
    answer: bytes
    """The serialized message."""


class ReplayStore:
    """Answers by request id, for ``ttl_s`` seconds after they were written.

    Together they take at most ``max_bytes``, and there are at most :data:`MAX_ENTRIES`; the oldest are removed first.
    Other servers write too, so more may be there for up to a minute. ``clock`` gives Unix time in seconds. Any method
    raises StoreUnavailable if the object store cannot be reached.
    """

    def __init__(self, blobs: Blobs, *, ttl_s: float, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self._blobs = blobs
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._bytes = self._entries = 0

    async def find(self, request_id: str) -> Replay | None:
        """The answer kept for a request id; None if there is none, if it has expired or if it is damaged."""
        path = _path(request_id)
        found = await self._blobs.fetch(path)
        if found is None:
            return None
        data, written_at = found
        try:
            data = await asyncio.to_thread(unsealed, path, data)
        except StoreCorrupt as error:
            _log.warning("damaged answer removed", path=path, error=error.message)
            await self._blobs.remove(path)
            return None
        if self._is_expired(written_at):
            await self._blobs.remove(path)
            return None
        return Replay(data[:_FINGERPRINT_BYTES], data[_FINGERPRINT_BYTES:])

    async def keep(self, request_id: str, replay: Replay) -> None:
        """Keep an answer, unless there is one for this request id or it is larger than all may be together."""
        path = _path(request_id)
        data = await asyncio.to_thread(sealed, path, replay.fingerprint + replay.answer)
        if len(data) > self._max_bytes or not await self._blobs.create(path, data):
            return
        self._bytes += len(data)
        self._entries += 1
        if self._bytes > self._max_bytes or self._entries > MAX_ENTRIES:
            await self.sweep()

    async def sweep(self) -> None:
        """Remove expired answers, and the oldest ones while there are too many or they take too many bytes."""
        listed = [blob for blob in await self._blobs.below(_FOLDER) if _OBJECT.fullmatch(blob.path)]
        kept: list[Blob] = []
        size_bytes = 0
        for blob in sorted(listed, key=lambda blob: blob.written_at, reverse=True):
            size_bytes += blob.size_bytes
            if self._is_expired(blob.written_at) or size_bytes > self._max_bytes or len(kept) == MAX_ENTRIES:
                break
            kept.append(blob)
        for blob in {*listed}.difference(kept):
            await self._blobs.remove(blob.path)
        self._bytes, self._entries = sum(blob.size_bytes for blob in kept), len(kept)

    async def sweep_repeatedly(self) -> None:
        """Sweep now and then, for ever."""
        while True:
            try:
                await self.sweep()
            except StoreUnavailable:
                _log.warning("expired answers not removed: object store unreachable")
            except Exception as error:
                report_unexpected("expired answers not removed", error)
            await asyncio.sleep(min(self._ttl_s / 4, _SWEEP_S))

    def _is_expired(self, written_at: float) -> bool:
        return written_at + self._ttl_s < self._clock()


def _path(request_id: str) -> str:
    return f"{_FOLDER}/{request_id}"
