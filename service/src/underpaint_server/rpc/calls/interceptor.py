"""What happens around every call of any shape: labels, log line, metrics, and errors turned into statuses."""

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from underpaint_server.errors import Bug, Cancelled, DeadlinePassed, InternalError, UnderpaintError
from underpaint_server.rpc.calls.held import HeldBytes
from underpaint_server.rpc.calls.record import CallRecord
from underpaint_server.rpc.responses import status
from underpaint_server.telemetry import Metrics

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any
"""``grpc.RpcMethodHandler``, which grpc does not type: one of its four attributes holds the function."""

_SHAPES: Final = {
    (False, False): "unary",
    (False, True): "server_stream",
    (True, False): "client_stream",
    (True, True): "bidi_stream",
}

_DEADLINE_TOLERANCE_S: Final = 0.1
"""The caller's deadline runs out slightly before the server's, so its cancellation may arrive first."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler; ``default_model`` is the id of the model for requests that name none.

    A unary request counts in ``held`` while its call lasts.
    """

    def __init__(self, metrics: Metrics, default_model: str, held: HeldBytes) -> None:
        self._metrics = metrics
        self._default_model = default_model
        self._held = held

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The handler of this RPC, wrapped; None if there is none, which gRPC reports as UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        shape = _SHAPES[handler.request_streaming, handler.response_streaming]

        def record() -> CallRecord:
            return CallRecord(self._metrics, handler_call_details.method, shape, self._default_model)

        return _wrap(handler, record, self._held)


def _wrap(handler: Handler, record: Callable[[], CallRecord], held: HeldBytes) -> Handler:
    inner = _function(handler)
    if handler.response_streaming:
        return _make(handler, lambda requests, context: _stream(inner, requests, context, record(), held))
    return _make(handler, lambda requests, context: _unary(inner, requests, context, record(), held))


async def _unary(inner: Callable[..., Any], request: Any, context: Context, call: CallRecord, held: HeldBytes) -> Any:
    async with _outcome(call, context):
        recorded = _recorded(request, call)
        with held.hold(_size(request)):
            response: Message = await inner(recorded, context)
        call.sent(response)
        return response


async def _stream(inner: Callable[..., Any], request: Any, context: Context, call: CallRecord, held: HeldBytes) -> None:
    async with _outcome(call, context):
        recorded = _recorded(request, call)
        with held.hold(_size(request)):
            await _answer(inner(recorded, context), context, call)


async def _answer(answers: Any, context: Context, call: CallRecord) -> None:
    is_generator = inspect.isasyncgen(answers)
    await (_write(answers, context, call) if is_generator else answers)


async def _write(answers: AsyncGenerator[Message, None], context: Context, call: CallRecord) -> None:
    # gRPC leaves a generator to the garbage collector when the caller cancels. One that is iterated here is closed at
    # once, so the work that it waits for is cancelled at once.
    async with aclosing(answers):
        async for message in answers:
            call.sent(message)
            await context.write(message)


def _recorded(request: Any, call: CallRecord) -> Any:
    if isinstance(request, Message):
        call.received(request)
        return request
    return _each_recorded(request, call)


def _size(request: Any) -> int:
    return request.ByteSize() if isinstance(request, Message) else 0


async def _each_recorded(requests: AsyncIterator[Message], call: CallRecord) -> AsyncIterator[Message]:
    async for request in requests:
        call.received(request)
        yield request


@asynccontextmanager
async def _outcome(call: CallRecord, context: Context) -> AsyncIterator[None]:
    try:
        yield
    except UnderpaintError as error:
        if isinstance(error, InternalError):
            call.crashed(error)
        await _abort(error, call, context)
    except asyncio.CancelledError:
        cause = _cause_of_cancel(context)
        call.ended(status.code_of(cause), cause.reason)
        raise
    except grpc.aio.AbortError:
        call.ended(_code(context))
        raise
    except Exception as error:
        call.crashed(error)
        await _abort(Bug(f"internal error; the server log has request ID {call.request_id}"), call, context)
    else:
        call.ended(grpc.StatusCode.OK)


async def _abort(error: UnderpaintError, call: CallRecord, context: Context) -> None:
    code = status.code_of(error)
    call.ended(code, error.reason)
    await context.abort(code, status.message_of(error), status.trailers(error, call.request_id))


def _cause_of_cancel(context: Context) -> UnderpaintError:
    left_s = context.time_remaining()
    expired = left_s is not None and left_s <= _DEADLINE_TOLERANCE_S
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


def _make(handler: Handler, function: Callable[[Any, Context], Awaitable[Any]]) -> Handler:
    async def behaviour(request: Any, context: Context) -> Any:
        return await function(request, context)

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
