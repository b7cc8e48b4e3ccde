"""Channels: their options, when they are opened, and how they end.

A channel is opened at the first call. It is used only in the process, and for asyncio only under the event loop, that
opened it: gRPC's threads do not survive a fork, and a ``grpc.aio`` channel belongs to one loop. So a client may be
created before a fork. Whether a process may fork after its first call depends on its version of gRPC.
"""

import asyncio
import inspect
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import grpc

from underpaint._target import Target
from underpaint._version import __version__
from underpaint.errors import Cancelled

C = TypeVar("C")
R = TypeVar("R")
_MIB = 1024 * 1024

MAX_MESSAGE_BYTES = 24 * _MIB
SERVICE_CONFIG: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # By default a channel whose server was gone for minutes waits up to two more before it looks again.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.primary_user_agent", f"underpaint-python/{__version__}"),
)
_HEADER_NAME = re.compile(r"[0-9A-Za-z_.-]+")
_HEADER_VALUE = re.compile(r"[ -~]*")
END = object()
"""What :func:`receive` returns after the last message of a stream."""


class Failure(Exception):
    """A call failed. It keeps the errors of our calls apart from those that a caller's callback raises."""

    def __init__(self, error: Any) -> None:
        super().__init__(str(error))
        self.error = error
        """Of an RPC the gRPC error, of a call after its last attempt the UnderpaintError."""


def options_of(target: Target) -> list[tuple[str, Any]]:
    """The options of a channel, overridden by the caller's."""
    local = {"grpc.enable_http_proxy": 0} if target.is_local else {}
    return list({**dict(OPTIONS), **local, **dict(target.options)}.items())


def headers_of(metadata: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The caller's metadata as gRPC takes it, with names in small letters; ValueError where a name or value cannot be a
    header, which gRPC would tell as an error of the server."""
    for name, value in metadata.items():
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"metadata: {name!r} is no name of a header: use letters, digits, '-', '_' and '.'")
        if not name.lower().endswith("-bin") and not _HEADER_VALUE.fullmatch(value):
            raise ValueError(f"metadata: the value of {name!r} has a line end or a character that is not ASCII")
    return tuple((name.lower(), value) for name, value in metadata.items())


class Opened:
    """A channel of a synchronous client."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.reached = False
        """Whether it has reached a server."""
        self._closing = threading.Event()

    def pause(self, seconds: float) -> None:
        """Wait; raises Cancelled when the channel is closed before or meanwhile."""
        if self._closing.wait(seconds):
            raise _closed()

    def close(self) -> None:
        """Close the channel; its calls end."""
        self._closing.set()
        self.channel.close()


class AsyncOpened:
    """A channel of an asynchronous client."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.reached = False
        """Whether it has reached a server."""
        self._closing = asyncio.Event()

    async def pause(self, seconds: float) -> None:
        """Wait; raises Cancelled when the channel is closed before or meanwhile."""
        try:
            await asyncio.wait_for(self._closing.wait(), seconds)
        except TimeoutError:
            return
        raise _closed()

    async def close(self) -> None:
        """Close the channel; its calls end."""
        self._closing.set()
        await self.channel.close()


def _closed() -> Cancelled:
    return Cancelled("the client was closed while the call ran")


class Owned(Generic[C]):
    """One channel for each owner (a process, or an event loop of a process), opened when it is first needed."""

    def __init__(self, make: Callable[[], C], owner: Callable[[], object]) -> None:
        self._make = make
        self._owner = owner
        self._lock = threading.Lock()
        self._held: tuple[object, C] | None = None
        self._inherited: list[C] = []

    def get(self) -> C:
        """The owner's channel."""
        owner = self._owner()
        with self._lock:
            if self._held is None or self._held[0] != owner:
                if self._held is not None:
                    # Kept open: closing another owner's channel waits for threads that this process does not have.
                    self._inherited.append(self._held[1])
                self._held = (owner, self._make())
            return self._held[1]

    def take(self) -> C | None:
        """Remove and return the owner's channel; None when there is none."""
        with self._lock:
            held, self._held = self._held, None
        return held[1] if held is not None and held[0] == self._owner() else None


class Connection:
    """The channel of a synchronous client."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._owned = Owned(self._open, os.getpid)

    def _open(self) -> Opened:
        target, options = self.target, options_of(self.target)
        if target.credentials is None:
            return Opened(grpc.insecure_channel(target.for_grpc, options=options))
        return Opened(grpc.secure_channel(target.for_grpc, target.credentials, options=options))

    def opened(self) -> Opened:
        """The channel."""
        return self._owned.get()

    def close(self) -> None:
        """Close the channel; the next call opens another."""
        opened = self._owned.take()
        if opened is not None:
            opened.close()


class AsyncConnection:
    """The channel of an asynchronous client."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._owned = Owned(self._open, lambda: (os.getpid(), asyncio.get_running_loop()))

    def _open(self) -> AsyncOpened:
        target, options = self.target, options_of(self.target)
        if target.credentials is None:
            return AsyncOpened(grpc.aio.insecure_channel(target.for_grpc, options=options))
        return AsyncOpened(grpc.aio.secure_channel(target.for_grpc, target.credentials, options=options))

    def opened(self) -> AsyncOpened:
        """The channel."""
        return self._owned.get()

    async def close(self) -> None:
        """Close the channel; the next call opens another."""
        opened = self._owned.take()
        if opened is not None:
            await opened.close()


def deliver(callback: Callable[[Any], Any], value: Any) -> None:
    """Call a callback."""
    callback(value)


async def deliver_async(callback: Callable[[Any], Any], value: Any) -> None:
    """Call a callback, which may be a coroutine function."""
    result = callback(value)
    if inspect.isawaitable(result):
        await result


def receive(call: Any) -> Any:
    """The next message of a server stream, or :data:`END`; raises Failure."""
    try:
        return next(call, END)
    except grpc.RpcError as error:
        raise Failure(error) from error


async def receive_async(call: Any) -> Any:
    """The next message of a server stream, or :data:`END`; raises Failure."""
    try:
        message = await call.read()
    except grpc.RpcError as error:
        raise Failure(error) from error
    return END if message is grpc.aio.EOF else message


def apart(function: Callable[..., R], *arguments: Any) -> R:
    """Call a function that may block."""
    return function(*arguments)


async def apart_async(function: Callable[..., R], *arguments: Any) -> R:
    """Call a function that may block, in a thread of its own."""
    return await asyncio.to_thread(function, *arguments)
