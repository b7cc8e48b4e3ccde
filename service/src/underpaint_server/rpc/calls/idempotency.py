"""Repeats of a request id: they join the request while it runs, and get its answer for some time after."""

import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from google.protobuf.message import Message

from underpaint_server.errors import FieldInvalid, FieldViolation, RequestIdReused
from underpaint_server.rpc.calls.singleflight import Deadline, SharedCall
from underpaint_server.telemetry import Metrics
from underpaint_server.wire.names import is_request_id


@dataclass(slots=True)
class _Entry:
    fingerprint: bytes
    flight: SharedCall[Any]
    bytes: int = 0
    """Of the answer, once there is one."""
    expires_at: float = float("inf")


class Idempotency:
    """Requests by id. Only good answers are kept: a request that failed may be tried again under its id.

    ``ttl_s`` counts from the answer; ``max_bytes`` bounds all kept answers together, the oldest of which go first.
    """

    def __init__(
        self, *, ttl_s: float, max_bytes: int, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._bytes = 0

    def join(
        self,
        request_id: str,
        fingerprint: bytes,
        run: Callable[[SharedCall[Any]], Awaitable[Message]],
        deadline: Deadline,
    ) -> SharedCall[Any]:
        """The flight of that request, a new one if it is the first; without an id it always is.

        Raises RequestIdReused where the id came before with another fingerprint, FieldInvalid for no UUID4.
        """
        if not request_id:
            return SharedCall(run, deadline)
        if not is_request_id(request_id):
            raise FieldInvalid(FieldViolation("request_id", "not a UUID of version 4"))
        request_id = request_id.lower()
        self._expire()
        entry = self._entries.get(request_id)
        if entry is not None and entry.flight.open:
            return self._again(request_id, entry, fingerprint, deadline)
        flight: SharedCall[Any] = SharedCall(run, deadline)
        self._forget(request_id)
        self._entries[request_id] = _Entry(fingerprint, flight)
        flight.on_done(lambda: self._ended(request_id, flight))
        return flight

    def _again(self, request_id: str, entry: _Entry, fingerprint: bytes, deadline: Deadline) -> SharedCall[Any]:
        if entry.fingerprint != fingerprint:
            raise RequestIdReused(f"request {request_id} came before with another payload; draw a new id")
        self._metrics.on_replay(result="replayed" if entry.flight.done else "joined")
        entry.flight.extend(deadline)
        return entry.flight

    def _ended(self, request_id: str, flight: SharedCall[Any]) -> None:
        entry = self._entries.get(request_id)
        if entry is None or entry.flight is not flight:
            return
        if not flight.open:
            self._forget(request_id)
            return
        del self._entries[request_id]  # to the end: the order is that of the answers
        entry.bytes, entry.expires_at = flight.answer.ByteSize(), self._clock() + self._ttl_s
        self._entries[request_id] = entry
        self._bytes += entry.bytes
        self._make_room()

    def _make_room(self) -> None:
        for request_id, entry in list(self._entries.items()):
            if self._bytes <= self._max_bytes:
                return
            if entry.flight.done:
                self._forget(request_id)

    def _expire(self) -> None:
        now = self._clock()
        expired = takewhile(lambda item: item[1].expires_at <= now or not item[1].flight.done, self._entries.items())
        for request_id in [key for key, entry in expired if entry.flight.done]:
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self._bytes -= entry.bytes


def fingerprint(kind: str, request: Message) -> bytes:
    """A digest of what is asked for; equal for equal requests, whatever their id and however it is written."""
    payload = type(request)()
    payload.CopyFrom(request)
    payload.ClearField("request_id")
    digest = hashlib.sha256(kind.encode())
    digest.update(payload.SerializeToString(deterministic=True))
    return digest.digest()
