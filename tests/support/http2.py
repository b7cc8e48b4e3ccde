"""Just enough of an HTTP/2 client to send a gRPC server what no gRPC client would send."""

import asyncio
import struct
from collections.abc import Sequence
from typing import Final

DATA, HEADERS, SETTINGS, GOAWAY = 0, 1, 4, 7
_END_STREAM, _END_HEADERS = 1, 4
_FIELDS: Final = (
    (b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"localhost"), (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
)  # fmt: skip


def message(payload: bytes, *, compressed: int = 0) -> bytes:
    """A length-prefixed message as gRPC sends it; ``compressed`` is its first byte."""
    return struct.pack(">BI", compressed, len(payload)) + payload


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, b"")
"""What a client sends first."""


async def send(address: str, *frames: bytes) -> None:
    """Open a connection, send these frames, and wait until the server has answered the last of them or closed."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(PREFACE + b"".join(frames))
    ping = frame(6, 0, 0, b"finished")
    writer.write(ping)
    await writer.drain()
    received = b""
    while frame(6, 1, 0, b"finished") not in received and (some := await reader.read(65536)):
        received += some
    writer.close()
    await writer.wait_closed()


def call(path: bytes, *messages: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """The frames of one call that ends its side of the stream."""
    fields = b"".join(_literal(name, value) for name, value in (*_FIELDS, (b":path", path), *headers))
    body = b"".join(messages)
    if not body:
        return frame(HEADERS, _END_HEADERS | _END_STREAM, 1, fields)
    return frame(HEADERS, _END_HEADERS, 1, fields) + frame(DATA, _END_STREAM, 1, body)


def opened(path: bytes, body: bytes) -> bytes:
    """The frames of one call that has sent ``body`` and not ended its side of the stream."""
    fields = b"".join(_literal(name, value) for name, value in (*_FIELDS, (b":path", path)))
    return frame(HEADERS, _END_HEADERS, 1, fields) + frame(DATA, 0, 1, body)


def _literal(name: bytes, value: bytes) -> bytes:
    """A header field without compression; both parts have fewer than 127 bytes."""
    assert max(len(name), len(value)) < 127
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value
