"""Channels: their options, and when they are opened.

A channel is opened at the first call. It is used only in the process, and for asyncio only under the event loop, that
opened it: gRPC's threads do not survive a fork, and a ``grpc.aio`` channel belongs to one loop. So a client may be
created before a fork. Whether a process may fork after its first call depends on its version of gRPC.
"""

import asyncio
import inspect
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc

from underpaint._version import __version__
from underpaint.errors import ConnectionFailed, DeadlinePassed

T = TypeVar("T")
_MIB = 1024 * 1024

# Called once before the first call, to tell a wrong target from a slow request. gRPC's own wait for readiness keeps a
# thread that logs an error when the channel is closed soon after. An empty message asks for the health of the server.
_PROBE = "/grpc.health.v1.Health/Check"

MAX_MESSAGE_BYTES = 24 * _MIB
SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [
                {"service": "underpaint.v1.EditService"},
                {"service": "underpaint.v1.InversionService"},
                {"service": "underpaint.v1.ModelService"},
                {"service": "underpaint.v1.DirectionService"},
                {"service": "google.longrunning.Operations"},
            ],
            "waitForReady": True,
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "3s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.2},
}
OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES + _MIB),  # gRPC does not retry a larger message
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.primary_user_agent", f"underpaint-python/{__version__}"),
)


@dataclass(frozen=True, slots=True)
class Target:
    """Address of the server, and how to connect to it."""

    address: str
    credentials: grpc.ChannelCredentials | None
    options: Sequence[tuple[str, Any]]
    connect_timeout: float
    """Seconds to wait for the first connection."""

    @property
    def all_options(self) -> list[tuple[str, Any]]:
        """The client's channel options, overridden by the caller's."""
        return list({**dict(OPTIONS), **dict(self.options)}.items())

    def check_probe(self, error: Any, waited_s: float) -> None:
        """Raise ConnectionFailed when the probe timed out; any other error was sent by a server."""
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise ConnectionFailed(
                f"no server answers at {self.address} within {waited_s:.3g} s: check that it runs, and the target"
            ) from error


class Deadline:
    """The time limit of a call, for all its RPCs together."""

    def __init__(self, timeout: float) -> None:
        self._end = time.monotonic() + timeout

    def left(self) -> float:
        """Seconds left, above 0; raises DeadlinePassed when none are."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlinePassed("the timeout passed before the call was complete: use a longer timeout")
        return left


@dataclass(slots=True)
class Opened(Generic[T]):
    """A channel, and whether it has reached a server."""

    channel: T
    reached: bool = False


class Owned(Generic[T]):
    """One channel for each owner (a process, or an event loop of a process), opened when it is first needed."""

    def __init__(self, make: Callable[[], T], owner: Callable[[], object]) -> None:
        self._make = make
        self._owner = owner
        self._lock = threading.Lock()
        self._held: tuple[object, Opened[T]] | None = None
        self._inherited: list[Opened[T]] = []

    def get(self) -> Opened[T]:
        """The owner's channel."""
        owner = self._owner()
        with self._lock:
            if self._held is None or self._held[0] != owner:
                if self._held is not None:
                    # Kept open: closing another owner's channel waits for threads that this process does not have.
                    self._inherited.append(self._held[1])
                self._held = (owner, Opened(self._make()))
            return self._held[1]

    def take(self) -> T | None:
        """Remove and return the owner's channel; None when there is none."""
        with self._lock:
            held, self._held = self._held, None
        return held[1].channel if held is not None and held[0] == self._owner() else None


class Connection:
    """The channel of a synchronous client."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._owned = Owned(self._open, os.getpid)

    def _open(self) -> grpc.Channel:
        target = self._target
        if target.credentials is None:
            return grpc.insecure_channel(target.address, options=target.all_options)
        return grpc.secure_channel(target.address, target.credentials, options=target.all_options)

    def channel(self, deadline: Deadline) -> grpc.Channel:
        """The channel, which has reached a server at least once."""
        opened = self._owned.get()
        if not opened.reached:
            wait_s = min(self._target.connect_timeout, deadline.left())
            try:
                probe: Any = opened.channel.unary_unary(_PROBE)
                probe(b"", timeout=wait_s, wait_for_ready=True)
            except grpc.RpcError as error:
                self._target.check_probe(error, wait_s)
            opened.reached = True
        return opened.channel

    def close(self) -> None:
        """Close the channel; the next call opens another."""
        channel = self._owned.take()
        if channel is not None:
            channel.close()


class AsyncConnection:
    """The channel of an asynchronous client."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._owned = Owned(self._open, lambda: (os.getpid(), asyncio.get_running_loop()))

    def _open(self) -> grpc.aio.Channel:
        target = self._target
        if target.credentials is None:
            return grpc.aio.insecure_channel(target.address, options=target.all_options)
        return grpc.aio.secure_channel(target.address, target.credentials, options=target.all_options)

    async def channel(self, deadline: Deadline) -> grpc.aio.Channel:
        """The channel, which has reached a server at least once."""
        opened = self._owned.get()
        if not opened.reached:
            wait_s = min(self._target.connect_timeout, deadline.left())
            try:
                probe: Any = opened.channel.unary_unary(_PROBE)
                await probe(b"", timeout=wait_s, wait_for_ready=True)
            except grpc.RpcError as error:
                self._target.check_probe(error, wait_s)
            opened.reached = True
        return opened.channel

    async def close(self) -> None:
        """Close the channel; the next call opens another."""
        channel = self._owned.take()
        if channel is not None:
            await channel.close()


def deliver(callback: Callable[[Any], Any], value: Any) -> None:
    """Call a callback."""
    callback(value)


async def deliver_async(callback: Callable[[Any], Any], value: Any) -> None:
    """Call a callback, which may be a coroutine function."""
    result = callback(value)
    if inspect.isawaitable(result):
        await result


def pause(seconds: float) -> None:
    """Sleep."""
    time.sleep(seconds)


async def pause_async(seconds: float) -> None:
    """Sleep without blocking the event loop."""
    await asyncio.sleep(seconds)
