"""Repeated request ids: a repeat joins the first request while it runs, and gets its answer for some time after."""

import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

from google.protobuf.message import Message

from underpaint_server.errors import FieldInvalid, FieldViolation, RequestIdReused
from underpaint_server.rpc.calls.singleflight import Deadline, SharedCall
from underpaint_server.telemetry import Metrics
from underpaint_server.wire.names import is_request_id

MAX_ANSWERS: Final = 10_000
"""Most answers that are kept."""


@dataclass(slots=True)
class _Entry:
    fingerprint: bytes
    call: SharedCall[Any]
    bytes: int = 0
    """Size of the answer; 0 until there is one."""
    expires_at: float = float("inf")
    """By the clock of :class:`Idempotency`; infinite until there is an answer."""


class Idempotency:
    """Requests by id. Only successful answers are kept: a request that failed may be retried with the same id.

    An answer is kept for ``ttl_s`` seconds. All kept answers together take at most ``max_bytes``, and there are at most
    ``max_answers``, because each takes a few kilobytes besides its own; the oldest are dropped first. Work whose last
    caller has left goes on for ``rejoin_s`` seconds, so that a repeat of its id can join it. ``clock`` gives seconds.
    """

    def __init__(
        self,
        *,
        ttl_s: float,
        max_bytes: int,
        rejoin_s: float,
        metrics: Metrics,
        max_answers: int = MAX_ANSWERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ttl_s = ttl_s
        self._rejoin_s = rejoin_s
        self._max_bytes = max_bytes
        self._max_answers = max_answers
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
        """The shared call of this request id; a new one that runs ``run`` if there is none, or if the id is empty.

        Raises RequestIdReused if the id was used with another fingerprint, FieldInvalid if it is not a UUID4.
        """
        if not request_id:
            return SharedCall(run, deadline)
        if not is_request_id(request_id):
            raise FieldInvalid(FieldViolation("request_id", "not a UUID of version 4; send one, or leave it empty"))
        request_id = request_id.lower()
        self._expire()
        entry = self._entries.get(request_id)
        if entry is not None and entry.call.open:
            return self._again(request_id, entry, fingerprint, deadline)
        call: SharedCall[Any] = SharedCall(run, deadline, self._rejoin_s)
        self._forget(request_id)
        self._entries[request_id] = _Entry(fingerprint, call)
        call.on_done(lambda: self._ended(request_id, call))
        return call

    def _again(self, request_id: str, entry: _Entry, fingerprint: bytes, deadline: Deadline) -> SharedCall[Any]:
        if entry.fingerprint != fingerprint:
            raise RequestIdReused(f"request_id {request_id} was used before with another payload; use a new id")
        self._metrics.on_replay(result="replayed" if entry.call.done else "joined")
        entry.call.extend(deadline)
        return entry.call

    def _ended(self, request_id: str, call: SharedCall[Any]) -> None:
        entry = self._entries.get(request_id)
        if entry is None or entry.call is not call:
            return
        if not call.open:
            self._forget(request_id)
            return
        del self._entries[request_id]  # moved to the end: entries are sorted by the time of their answer
        entry.bytes, entry.expires_at = call.answer.ByteSize(), self._clock() + self._ttl_s
        self._entries[request_id] = entry
        self._bytes += entry.bytes
        self._make_room()

    def _make_room(self) -> None:
        while self._bytes > self._max_bytes or len(self._entries) > self._max_answers:
            oldest = next((request_id for request_id, entry in self._entries.items() if entry.call.done), None)
            if oldest is None:
                return
            self._forget(oldest)

    def _expire(self) -> None:
        now = self._clock()
        expired = takewhile(lambda item: item[1].expires_at <= now or not item[1].call.done, self._entries.items())
        for request_id in [key for key, entry in expired if entry.call.done]:
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self._bytes -= entry.bytes


def fingerprint(kind: str, request: Message) -> bytes:
    """SHA-256 over the kind of call and the request without its id; equal for equal requests."""
    payload = type(request)()
    payload.CopyFrom(request)
    payload.ClearField("request_id")
    digest = hashlib.sha256(kind.encode())
    digest.update(payload.SerializeToString(deterministic=True))
    return digest.digest()
