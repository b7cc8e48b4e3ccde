"""From errors to gRPC statuses: the table of codes, and ``google.rpc.Status`` with its details."""

import re
from collections.abc import Iterator
from typing import Final

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from underpaint_server import errors
from underpaint_server.errors import UnderpaintError

DOMAIN: Final = "underpaint"

CODES: Final[dict[type[UnderpaintError], grpc.StatusCode]] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.PreconditionFailed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Conflict: grpc.StatusCode.ABORTED,
    errors.DirectionExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.OperationsFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DirectionsFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.OutOfMemory: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.PayloadTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.MethodDisabled: grpc.StatusCode.UNIMPLEMENTED,
    errors.RpcUnknown: grpc.StatusCode.UNIMPLEMENTED,
    errors.StoreCorrupt: grpc.StatusCode.DATA_LOSS,
    errors.InternalError: grpc.StatusCode.INTERNAL,
    UnderpaintError: grpc.StatusCode.INTERNAL,
}
"""A class that is not in the table has the code of its nearest base class that is."""

# Message and details of a status are sent in the trailers, and many clients accept at most 8 KiB of those. In the
# message every byte outside ASCII is encoded as three.
_MESSAGE_BYTES: Final = 600
_DETAIL_BYTES: Final = 160
_VIOLATIONS: Final = 12
_RETRY_AFTER_S: Final = 1.0
_ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")

Trailers = tuple[tuple[str, str | bytes], ...]


def code_of(error: UnderpaintError) -> grpc.StatusCode:
    """The gRPC status code of an error."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def message_of(error: UnderpaintError) -> str:
    """The status message: the error's message, cut to a length that fits into the trailers."""
    return _cut(error.message, _MESSAGE_BYTES)


def rich_status(error: UnderpaintError, request_id: str) -> status_pb2.Status:
    """The status with its details: ``ErrorInfo`` first, and at most one of each other type."""
    status = status_pb2.Status(code=code_of(error).value[0], message=message_of(error))
    for detail in _details(error, request_id):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def trailers(error: UnderpaintError, request_id: str) -> Trailers:
    """Trailing metadata: the rich status, and for ``Unavailable`` the time after which the channel may retry."""
    details: Trailers = (("grpc-status-details-bin", rich_status(error, request_id).SerializeToString()),)
    if isinstance(error, errors.Unavailable):
        return (*details, ("grpc-retry-pushback-ms", str(round(1000 * _retry_after_s(error)))))
    return details


def _details(error: UnderpaintError, request_id: str) -> Iterator[Message]:
    metadata = {key: _cut(value, _DETAIL_BYTES) for key, value in error.metadata.items()}
    yield error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    if request_id:
        yield error_details_pb2.RequestInfo(request_id=request_id)
    match error:
        case errors.FieldInvalid() | errors.NonFiniteLatents():
            yield _bad_request(error)
        case errors.NotFound() | errors.Conflict():
            yield error_details_pb2.ResourceInfo(
                resource_type=metadata.get("resource_type", ""),
                resource_name=metadata.get("resource_name", ""),
                description=_cut(error.message, _DETAIL_BYTES),
            )
        case errors.PreconditionFailed():
            yield _precondition(error)
        case errors.Unavailable():
            delay = Duration()
            delay.FromNanoseconds(round(_retry_after_s(error) * 1e9))
            yield error_details_pb2.RetryInfo(retry_delay=delay)


def _bad_request(error: errors.FieldInvalid | errors.NonFiniteLatents) -> error_details_pb2.BadRequest:
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=v.path, description=_cut(v.description, _DETAIL_BYTES))
            for v in error.violations[:_VIOLATIONS]
        ]
    )


def _precondition(error: errors.PreconditionFailed) -> error_details_pb2.PreconditionFailure:
    violation = error_details_pb2.PreconditionFailure.Violation(
        type=error.reason,
        subject=error.metadata.get("resource_name", ""),
        description=_cut(error.message, _DETAIL_BYTES),
    )
    return error_details_pb2.PreconditionFailure(violations=[violation])


def _retry_after_s(error: UnderpaintError) -> float:
    return _RETRY_AFTER_S if error.retry_after_s is None else max(0.0, error.retry_after_s)


def _cut(text: str, limit_bytes: int) -> str:
    """The text without addresses of objects, which libraries put into theirs, and of at most ``limit_bytes``."""
    text = _ADDRESS.sub("", text)
    encoded = text.encode()
    return text if len(encoded) <= limit_bytes else encoded[: limit_bytes - 3].decode(errors="ignore") + "…"
