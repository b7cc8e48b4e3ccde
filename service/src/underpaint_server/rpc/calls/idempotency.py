"""Repeated request ids: a repeat joins the first request while it runs, and gets its answer for some time after.

Answers are kept in memory and, if other servers share the store, there too: a repeat that comes to another server gets
the answer as well. It does not join a request that still runs on another server; then both compute it.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final, TypeVar

import structlog
from google.protobuf.message import DecodeError, Message

from underpaint_server.errors import FieldInvalid, FieldViolation, RequestIdReused
from underpaint_server.rpc.calls.singleflight import Deadline, SharedCall
from underpaint_server.stores import ReplayStore
from underpaint_server.stores.replays import Replay
from underpaint_server.telemetry import Metrics
from underpaint_server.wire.names import is_request_id

T = TypeVar("T")

MAX_ANSWERS: Final = 10_000
"""Most answers that are kept."""
_STORE_S: Final = 5.0
"""Longest time in seconds that a call waits for the store, to look for its answer there or to leave it there."""
_PAUSE_S: Final = 30.0
"""Seconds for which the store is not asked after it could not be reached."""

_log = structlog.get_logger()


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
    ``replays`` has the answers of other servers too; None if there are none. While it cannot be reached, calls go on
    without it, and only one every half a minute waits for it.
    """

    def __init__(
        self,
        *,
        ttl_s: float,
        max_bytes: int,
        rejoin_s: float,
        metrics: Metrics,
        replays: ReplayStore | None = None,
        max_answers: int = MAX_ANSWERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ttl_s = ttl_s
        self._rejoin_s = rejoin_s
        self._max_bytes = max_bytes
        self._max_answers = max_answers
        self._metrics = metrics
        self._replays = replays
        self._ask_at = float("-inf")
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._bytes = 0

    def join(
        self,
        request_id: str,
        fingerprint: bytes,
        kind: type[Message],
        run: Callable[[SharedCall[Any]], Awaitable[Message]],
        deadline: Deadline,
    ) -> SharedCall[Any]:
        """The shared call of this request id; a new one that runs ``run`` if there is none, or if the id is empty.

        ``kind`` is the class of the answer. Raises RequestIdReused if the id was used here with another fingerprint,
        FieldInvalid if it is not a UUID4. If the id was used so on another server, the call raises RequestIdReused.
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

        async def replay_or_run(call: SharedCall[Any]) -> Message:
            return await self._stored(request_id, fingerprint, kind) or await self._run(
                request_id, fingerprint, run, call
            )

        call: SharedCall[Any] = SharedCall(run if self._replays is None else replay_or_run, deadline, self._rejoin_s)
        self._forget(request_id)
        self._entries[request_id] = _Entry(fingerprint, call)
        call.on_done(lambda: self._ended(request_id, call))
        return call

    def _again(self, request_id: str, entry: _Entry, fingerprint: bytes, deadline: Deadline) -> SharedCall[Any]:
        if entry.fingerprint != fingerprint:
            raise _reused(request_id)
        self._metrics.on_replay(result="replayed" if entry.call.done else "joined")
        entry.call.extend(deadline)
        return entry.call

    async def _stored(self, request_id: str, fingerprint: bytes, kind: type[Message]) -> Message | None:
        """The answer that a server has left in the store; None if there is none, or if the store cannot be reached."""
        replay = await self._reach(lambda replays: replays.find(request_id))
        if replay is None:
            return None
        if replay.fingerprint != fingerprint:
            raise _reused(request_id)
        try:
            answer = kind.FromString(replay.answer)
        except DecodeError:
            return None
        self._metrics.on_replay(result="stored")
        return answer

    async def _run(
        self,
        request_id: str,
        fingerprint: bytes,
        run: Callable[[SharedCall[Any]], Awaitable[Message]],
        call: SharedCall[Any],
    ) -> Message:
        """Run, and leave the answer in the store before any caller gets it."""
        answer = await run(call)
        replay = Replay(fingerprint, answer.SerializeToString())
        await self._reach(lambda replays: replays.keep(request_id, replay))
        return answer

    async def _reach(self, ask: Callable[[ReplayStore], Awaitable[T]]) -> T | None:
        """What the store answers; None if it cannot be reached, and then for a while without asking it."""
        if self._replays is None or self._clock() < self._ask_at:
            return None
        try:
            async with asyncio.timeout(_STORE_S):
                return await ask(self._replays)
        except Exception as error:  # the call goes on without it
            self._ask_at = self._clock() + _PAUSE_S
            _log.warning("answers of request ids are neither looked for nor left in the store", error=repr(error))
            return None

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


def _reused(request_id: str) -> RequestIdReused:
    return RequestIdReused(f"request_id {request_id} was used before with another payload; use a new id")


def fingerprint(kind: str, request: Message) -> bytes:
    """SHA-256 over the kind of call and the request without its id; equal for equal requests."""
    payload = type(request)()
    payload.CopyFrom(request)
    payload.ClearField("request_id")
    digest = hashlib.sha256(kind.encode())
    digest.update(payload.SerializeToString(deterministic=True))
    return digest.digest()
