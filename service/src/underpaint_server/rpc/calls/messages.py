"""The messages of a call: read from the transport, decoded and checked here, so that every refusal is one of ours."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from underpaint_server.errors import FieldInvalid, FieldViolation, PayloadTooLarge, RequestUndecodable
from underpaint_server.rpc.calls.limits import CallLimits
from underpaint_server.rpc.calls.record import CallRecord

Context = grpc.aio.ServicerContext[Any, Any]

TRANSPORT_FACTOR: Final = 2
"""How many times larger than ``max_message_bytes`` a message may be for the transport. It refuses a larger one with a
text of its own before it has received it; one in between is received, and refused with our reason."""

_NAMED_BYTES: Final = 64 * 1024
"""Most bytes of unknown fields that are looked through for their numbers: each field takes far more memory there."""
_NAMED: Final = 12
_CANCEL_S: Final = 0.05
"""Seconds within which a call that the transport has refused is cancelled here."""


class Requests:
    """Reads the request messages of one call.

    ``parse`` decodes one message of at most ``max_bytes``; ``record`` counts it; ``limits`` ends the wait for it.
    """

    def __init__(
        self,
        context: Context,
        parse: Callable[[bytes], Message],
        max_bytes: int,
        record: CallRecord,
        limits: CallLimits,
    ) -> None:
        self._context = context
        self._parse = parse
        self._max_bytes = max_bytes
        self._record = record
        self._limits = limits
        self.last_bytes = 0
        """Encoded size of the message that was read last."""

    async def one(self) -> Message:
        """The message of a call that has exactly one.

        Raises RequestUndecodable where there is none or more than one, and what :meth:`all` raises.
        """
        async with self._limits.arrival():
            message = await self._next()
            if message is None:
                # Some messages that are too large when decompressed also end here: the transport leaves them out.
                raise RequestUndecodable(
                    f"no request message arrived; send exactly one, of at most {self._max_bytes} bytes, then end the"
                    " stream"
                )
            if await self._context.read() is not grpc.aio.EOF:
                raise RequestUndecodable("the call has more than one request message; send exactly one")
            return message

    async def all(self) -> AsyncIterator[Message]:
        """Each message as it arrives.

        Raises PayloadTooLarge, RequestUndecodable, FieldInvalid for unknown fields; RequestIncomplete or QueueFull for
        a message that is late.
        """
        while True:
            async with self._limits.arrival():
                message = await self._next()
            if message is None:
                return
            yield message

    async def _next(self) -> Message | None:
        raw = await self._context.read()
        if raw is grpc.aio.EOF:
            await self._check_cancelled()
            return None
        self.last_bytes = len(raw)
        check_size("the request", len(raw), self._max_bytes)
        message = decoded(raw, self._parse)
        self._record.received(message, len(raw))
        return message

    async def _check_cancelled(self) -> None:
        """Raise CancelledError if the stream ended because the transport refused a message, or the caller left.

        The transport has answered the caller then; here it shows as the end of the stream, and a moment later as the
        end of the call.
        """
        waited_s = 0.0
        while not self._context.cancelled() and waited_s < _CANCEL_S:
            await asyncio.sleep(_CANCEL_S / 10)
            waited_s += _CANCEL_S / 10
        if self._context.cancelled():
            raise asyncio.CancelledError


def check_size(what: str, size: int, limit: int) -> None:
    """Raises PayloadTooLarge for a message of more than ``limit`` bytes."""
    if size > limit:
        raise PayloadTooLarge(
            f"{what} has {size} bytes, more than the limit of {limit}: use a smaller image, or JPEG instead of PNG",
            metadata={"unit": "bytes", "limit": str(limit), "actual": str(size)},
        )


def decoded(raw: bytes, parse: Callable[[bytes], Message]) -> Message:
    """The message of these bytes.

    Raises RequestUndecodable, and FieldInvalid for fields that this server's contract does not have, also nested ones:
    a newer client asked for something that would be ignored.
    """
    try:
        message = parse(raw)
    except DecodeError:
        raise RequestUndecodable("the request is not an encoded message of this call's type") from None
    # Without unknown fields, and encoded as usual, the size stays; otherwise the bytes are looked at again.
    message.DiscardUnknownFields()
    if message.ByteSize() != len(raw):
        _check_known(parse(raw), message.ByteSize())
    return message


def _check_known(message: Message, known_bytes: int) -> None:
    unknown_bytes = message.ByteSize() - known_bytes
    if unknown_bytes == 0:
        return
    if unknown_bytes > _NAMED_BYTES:
        raise FieldInvalid(FieldViolation("*", f"{unknown_bytes} bytes of fields that this server does not know"))
    paths = dict.fromkeys(islice(_unknown_paths(message, ""), _NAMED))
    raise FieldInvalid(*(FieldViolation(path, _UNKNOWN) for path in paths))


_UNKNOWN: Final = (
    "this server's contract has no field of this number and type; leave it out, or use a server as new as the client"
)


def _unknown_paths(message: Message, prefix: str) -> Iterator[str]:
    unknown_fields: Any = UnknownFieldSet(message)  # its stubs do not say that it is iterable
    for unknown in unknown_fields:
        yield f"{prefix}{unknown.field_number}"
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if isinstance(value, Message):
            yield from _unknown_paths(value, f"{prefix}{field.name}.")
        else:
            for index, item in enumerate(value):
                yield from _unknown_paths(item, f"{prefix}{field.name}[{index}].")
