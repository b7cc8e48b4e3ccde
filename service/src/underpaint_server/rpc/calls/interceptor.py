"""What happens around every call of any shape: labels, log line, metrics, and errors turned into statuses.

To gRPC every call is a stream of bytes in both directions. So messages are read and decoded here, and what is wrong
with them, or with the number of them, is answered by our table of statuses instead of the library.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from traceback import clear_frames
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from underpaint_server.dispatch.queue import DEADLINE_TOLERANCE_S
from underpaint_server.errors import (
    Bug,
    Cancelled,
    DeadlinePassed,
    InternalError,
    RpcUnknown,
    UnderpaintError,
    forget_frames,
)
from underpaint_server.rpc.calls.limits import CallLimits
from underpaint_server.rpc.calls.messages import Context, Requests, check_size
from underpaint_server.rpc.calls.record import CallRecord
from underpaint_server.rpc.responses import status
from underpaint_server.telemetry import Metrics

Handler = Any
"""``grpc.RpcMethodHandler``, which grpc does not type: one of its four attributes holds the function."""

_SHAPES: Final = {
    (False, False): "unary",
    (False, True): "server_stream",
    (True, False): "client_stream",
    (True, True): "bidi_stream",
}

_TAKEN_S: Final = 60.0
_SLOWEST_BYTES_PER_S: Final = 16 * 1024
"""A caller who takes a message more slowly than this, after ``_TAKEN_S`` seconds more, counts as gone."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler.

    ``default_model`` is the id of the model for requests that name none. No message of either direction may have more
    than ``max_message_bytes``. ``limits`` says how many calls there may be, how long a request may take to
    arrive, and how many bytes of requests are held while their calls last.
    """

    def __init__(self, metrics: Metrics, default_model: str, max_message_bytes: int, limits: CallLimits) -> None:
        self._metrics = metrics
        self._default_model = default_model
        self._max_message_bytes = max_message_bytes
        self._limits = limits

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The handler of this RPC, wrapped; one that refuses the call if there is none."""
        handler = await continuation(handler_call_details)
        path = handler_call_details.method

        async def behaviour(_: Any, context: Context) -> None:
            if handler is None:
                record = CallRecord(self._metrics, path, "unknown", self._default_model, is_known=False)
            else:
                shape = _SHAPES[handler.request_streaming, handler.response_streaming]
                record = CallRecord(self._metrics, path, shape, self._default_model)
            async with _outcome(record, context):
                if handler is None:
                    raise RpcUnknown("this server has no such RPC; its reflection service lists those it has")
                await self._serve(handler, path, context, record)

        serialize = None if handler is None else handler.response_serializer
        return grpc.stream_stream_rpc_method_handler(behaviour, None, serialize)

    # Not part of ``behaviour``: the library keeps the frame of that one with an error of its own.
    async def _serve(self, handler: Handler, path: str, context: Context, record: CallRecord) -> None:
        requests = Requests(context, handler.request_deserializer, self._max_message_bytes, record, self._limits)
        request = requests.all() if handler.request_streaming else await requests.one()
        with self._limits.call(path, requests.last_bytes):
            await self._answer(handler, request, context, record)

    async def _answer(self, handler: Handler, request: Any, context: Context, record: CallRecord) -> None:
        answers = _function(handler)(request, context)
        if not handler.response_streaming:
            await self._write(await answers, context, record)
        elif isinstance(answers, AsyncGenerator):
            # gRPC leaves a generator to the garbage collector when the caller cancels. One that is iterated here is
            # closed at once, so the work that it waits for is cancelled at once.
            async with aclosing(answers):
                async for message in answers:
                    await self._write(message, context, record)
        else:
            await answers

    async def _write(self, message: Message, context: Context, record: CallRecord) -> None:
        size = message.ByteSize()
        check_size("the answer", size, self._max_message_bytes)
        record.sent(size)
        # A caller who reads nothing would otherwise keep its request and its answer in memory as long as it likes.
        try:
            async with asyncio.timeout(_TAKEN_S + size / _SLOWEST_BYTES_PER_S):
                await context.write(message)
        except TimeoutError:
            raise asyncio.CancelledError from None


@asynccontextmanager
async def _outcome(call: CallRecord, context: Context) -> AsyncIterator[None]:
    try:
        yield
    except UnderpaintError as error:
        if isinstance(error, InternalError):
            call.crashed(error)
        _refuse(error, call, context)
        forget_frames(error)
    except (asyncio.CancelledError, grpc.aio.InternalError) as error:
        # The library's own error is that of an answer which cannot be sent, because the call has ended for the caller.
        cause = _cause_of_cancel(context)
        call.ended(status.code_of(cause), cause.reason)
        if isinstance(error, asyncio.CancelledError):
            raise
        raise asyncio.CancelledError from None
    except grpc.aio.AbortError as error:  # of the health service, or of one of the library's own
        call.ended(_code(context))
        clear_frames(error.__traceback__)  # the library keeps the error, and would keep the request with it
        raise
    except Exception as error:
        call.crashed(error)
        _refuse(Bug(f"internal error; the server log has request ID {call.request_id}"), call, context)
        forget_frames(error)
    else:
        call.ended(grpc.StatusCode.OK)


def _refuse(error: UnderpaintError, call: CallRecord, context: Context) -> None:
    """Set the status with which the call ends.

    ``context.abort`` would do it by an exception that the context keeps, and with it the frames and the request.
    """
    code = status.code_of(error)
    call.ended(code, error.reason)
    context.set_code(code)
    context.set_details(status.message_of(error))
    context.set_trailing_metadata(status.trailers(error, call.request_id))


def _cause_of_cancel(context: Context) -> UnderpaintError:
    left_s = context.time_remaining()
    expired = left_s is not None and left_s <= DEADLINE_TOLERANCE_S
    return DeadlinePassed("before the answer") if expired else Cancelled("by the caller")


def _code(context: Context) -> grpc.StatusCode:
    number = context.code()
    return next((code for code in grpc.StatusCode if number in (code, code.value[0])), grpc.StatusCode.UNKNOWN)


def _function(handler: Handler) -> Callable[..., Any]:
    functions: tuple[Callable[..., Any] | None, ...] = (
        handler.unary_unary,
        handler.unary_stream,
        handler.stream_unary,
        handler.stream_stream,
    )
    return next(function for function in functions if function is not None)
