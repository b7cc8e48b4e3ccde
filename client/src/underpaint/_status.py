"""From a gRPC error to an UnderpaintError: the table of classes, and the decoding of ``google.rpc.Status``."""

from typing import TYPE_CHECKING, Any

import grpc

from underpaint import errors
from underpaint.errors import FieldViolation, UnderpaintError

if TYPE_CHECKING:
    from google.protobuf.message import Message

_TRAILER = "grpc-status-details-bin"
_Code = grpc.StatusCode

TABLE: dict[tuple[grpc.StatusCode, str], type[UnderpaintError]] = {
    (_Code.INVALID_ARGUMENT, ""): errors.InvalidRequest,
    (_Code.INVALID_ARGUMENT, "FIELD_INVALID"): errors.FieldInvalid,
    (_Code.INVALID_ARGUMENT, "REQUEST_UNDECODABLE"): errors.RequestUndecodable,
    (_Code.INVALID_ARGUMENT, "IMAGE_UNDECODABLE"): errors.ImageUndecodable,
    (_Code.INVALID_ARGUMENT, "IMAGE_TOO_LARGE"): errors.ImageTooLarge,
    (_Code.INVALID_ARGUMENT, "REQUEST_ID_REUSED"): errors.RequestIdReused,
    (_Code.INVALID_ARGUMENT, "NON_FINITE_LATENTS"): errors.NonFiniteLatents,
    (_Code.OUT_OF_RANGE, ""): errors.InvalidRequest,
    (_Code.NOT_FOUND, ""): errors.NotFound,
    (_Code.NOT_FOUND, "MODEL_NOT_FOUND"): errors.ModelNotFound,
    (_Code.NOT_FOUND, "INVERSION_EXPIRED"): errors.InversionExpired,
    (_Code.NOT_FOUND, "DIRECTION_NOT_FOUND"): errors.DirectionNotFound,
    (_Code.NOT_FOUND, "OPERATION_NOT_FOUND"): errors.OperationNotFound,
    (_Code.FAILED_PRECONDITION, ""): errors.PreconditionFailed,
    (_Code.FAILED_PRECONDITION, "INVERSION_MODEL_MISMATCH"): errors.InversionModelMismatch,
    (_Code.FAILED_PRECONDITION, "DIRECTION_MODEL_MISMATCH"): errors.DirectionModelMismatch,
    (_Code.FAILED_PRECONDITION, "DIRECTION_STEPS_MISMATCH"): errors.DirectionStepsMismatch,
    (_Code.FAILED_PRECONDITION, "LEARNING_UNSUPPORTED"): errors.LearningUnsupported,
    (_Code.FAILED_PRECONDITION, "OPERATION_RUNNING"): errors.OperationRunning,
    (_Code.FAILED_PRECONDITION, "MODEL_NOT_READY"): errors.ModelNotReady,
    (_Code.UNAVAILABLE, ""): errors.ConnectionFailed,
    (_Code.UNAVAILABLE, "*"): errors.Unavailable,
    (_Code.UNAVAILABLE, "QUEUE_FULL"): errors.QueueFull,
    (_Code.UNAVAILABLE, "DRAINING"): errors.Draining,
    (_Code.UNAVAILABLE, "MODEL_LOADING"): errors.ModelLoading,
    (_Code.UNAVAILABLE, "WORKER_RESTARTED"): errors.WorkerRestarted,
    (_Code.UNAVAILABLE, "STORE_UNAVAILABLE"): errors.StoreUnavailable,
    (_Code.DEADLINE_EXCEEDED, ""): errors.DeadlinePassed,
    (_Code.DEADLINE_EXCEEDED, "DEADLINE_UNATTAINABLE"): errors.DeadlineUnattainable,
    (_Code.DEADLINE_EXCEEDED, "DEADLINE_PASSED"): errors.DeadlinePassed,
    (_Code.DEADLINE_EXCEEDED, "REQUEST_INCOMPLETE"): errors.RequestIncomplete,
    (_Code.RESOURCE_EXHAUSTED, ""): errors.ResourceExhausted,
    (_Code.RESOURCE_EXHAUSTED, "OPERATIONS_FULL"): errors.OperationsFull,
    (_Code.RESOURCE_EXHAUSTED, "DIRECTIONS_FULL"): errors.DirectionsFull,
    (_Code.RESOURCE_EXHAUSTED, "GPU_OUT_OF_MEMORY"): errors.OutOfMemory,
    (_Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"): errors.QuotaExceeded,
    (_Code.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE"): errors.PayloadTooLarge,
    (_Code.CANCELLED, ""): errors.Cancelled,
    (_Code.UNAUTHENTICATED, ""): errors.Unauthenticated,
    (_Code.PERMISSION_DENIED, ""): errors.PermissionDenied,
    (_Code.ABORTED, ""): errors.Conflict,
    (_Code.ABORTED, "ETAG_MISMATCH"): errors.EtagMismatch,
    (_Code.ALREADY_EXISTS, ""): errors.Conflict,
    (_Code.ALREADY_EXISTS, "DIRECTION_EXISTS"): errors.DirectionExists,
    (_Code.UNIMPLEMENTED, ""): errors.MethodDisabled,
    (_Code.UNIMPLEMENTED, "RPC_UNKNOWN"): errors.RpcUnknown,
    (_Code.DATA_LOSS, ""): errors.DataLoss,
    (_Code.DATA_LOSS, "STORE_CORRUPT"): errors.StoreCorrupt,
    (_Code.INTERNAL, ""): errors.ServerError,
    (_Code.INTERNAL, "NON_FINITE_LATENTS"): errors.NonFiniteLatents,  # servers of earlier builds
    (_Code.INTERNAL, "MODEL_NON_FINITE"): errors.ModelNonFinite,
    (_Code.INTERNAL, "BUG"): errors.Bug,
    (_Code.UNKNOWN, ""): errors.ServerError,
}
"""Class by status code and ``ErrorInfo.reason``: "" is no reason, "*" any reason not listed, else that of ""."""


def translate(error: grpc.RpcError, request_id: str) -> UnderpaintError:
    """The error to raise for a failed call; ``error`` becomes its cause."""
    call: Any = error  # for both kinds of channel the error has the methods of the call
    translated = _error(call.code(), call.details() or "", _details(call.trailing_metadata()), request_id)
    translated.__cause__ = error
    return translated


def from_status(status: Any) -> UnderpaintError:
    """The error in a ``google.rpc.Status`` that is part of an answer."""
    code = next((code for code in grpc.StatusCode if code.value[0] == status.code), grpc.StatusCode.UNKNOWN)
    return _error(code, status.message, _unpacked(status), "")


def _error(code: grpc.StatusCode, message: str, details: "tuple[Message, ...]", request_id: str) -> UnderpaintError:
    facts = _facts(details)
    reason = facts.pop("reason", "")
    kind = _kind(code, reason)
    if kind is errors.ResourceExhausted and "larger than max" in message:
        kind = errors.PayloadTooLarge  # gRPC's own error has no reason, only this text
    elif message == "Deadline Exceeded":  # gRPC's own text when the caller's timeout passes
        message = "the timeout passed before the server answered: use a longer timeout"
    facts.setdefault("request_id", request_id)
    return kind(message or code.name, reason=reason, details=details, **facts)


def _kind(code: grpc.StatusCode, reason: str) -> type[UnderpaintError]:
    for key in ((code, reason), (code, "*"), (code, "")):
        if key in TABLE:
            return TABLE[key]
    return errors.ServerError


def _details(trailers: Any) -> "tuple[Message, ...]":
    from google.protobuf.message import DecodeError
    from google.rpc import status_pb2

    payload = next((value for key, value in trailers or () if key == _TRAILER), b"")
    try:
        return _unpacked(status_pb2.Status.FromString(payload))
    except DecodeError:
        return ()  # a proxy may write such a trailer; code and message remain


def _unpacked(status: Any) -> "tuple[Message, ...]":
    from google.rpc import error_details_pb2

    details: list[Message] = []
    for packed in status.details:
        kind = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2], None)
        if kind is not None and packed.Is(kind.DESCRIPTOR):
            details.append(kind.FromString(packed.value))
    return tuple(details)


def _facts(details: "tuple[Message, ...]") -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for detail in details:
        message: Any = detail
        match detail.DESCRIPTOR.name:
            case "ErrorInfo":
                facts |= {"reason": message.reason, "metadata": dict(message.metadata)}
            case "BadRequest":
                facts["violations"] = tuple(FieldViolation(v.field, v.description) for v in message.field_violations)
            case "RetryInfo":
                facts["retry_after_s"] = message.retry_delay.ToNanoseconds() / 1e9
            case "RequestInfo":
                facts["request_id"] = message.request_id
    return facts
