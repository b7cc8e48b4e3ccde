"""Every error that a caller can receive, as one class tree.

::

    UnderpaintError
    ├── InvalidRequest            the request itself is wrong; repeating it fails again
    │   ├── FieldInvalid              FIELD_INVALID         one or more fields, each with its path
    │   ├── RequestUndecodable        REQUEST_UNDECODABLE   no message, more than one, or bytes of another type
    │   ├── ImageUndecodable          IMAGE_UNDECODABLE
    │   ├── ImageTooLarge             IMAGE_TOO_LARGE
    │   ├── NonFiniteLatents          NON_FINITE_LATENTS    extreme values made the latents NaN or infinite
    │   └── RequestIdReused           REQUEST_ID_REUSED     same request_id, another payload
    ├── NotFound                  no such resource
    │   ├── ModelNotFound             MODEL_NOT_FOUND
    │   ├── InversionExpired          INVERSION_EXPIRED     expired, or never made
    │   ├── DirectionNotFound         DIRECTION_NOT_FOUND
    │   └── OperationNotFound         OPERATION_NOT_FOUND   deleted, expired, or never made
    ├── PreconditionFailed        valid request, but the server or the resource is in another state
    │   ├── InversionModelMismatch    INVERSION_MODEL_MISMATCH
    │   ├── DirectionModelMismatch    DIRECTION_MODEL_MISMATCH
    │   ├── DirectionStepsMismatch    DIRECTION_STEPS_MISMATCH
    │   ├── LearningUnsupported       LEARNING_UNSUPPORTED  the model has no CLIP for the loss
    │   ├── OperationRunning          OPERATION_RUNNING     only a finished operation can be deleted
    │   └── ModelNotReady             MODEL_NOT_READY       the model failed to load
    ├── Conflict                  another caller changed or created the resource first
    │   ├── EtagMismatch              ETAG_MISMATCH
    │   └── DirectionExists           DIRECTION_EXISTS
    ├── Unavailable               temporary; retry after ``retry_after_s``
    │   ├── QueueFull                 QUEUE_FULL
    │   ├── Draining                  DRAINING
    │   ├── ModelLoading              MODEL_LOADING
    │   ├── WorkerRestarted           WORKER_RESTARTED
    │   └── StoreUnavailable          STORE_UNAVAILABLE     the object store is unreachable
    ├── DeadlineExceeded
    │   ├── DeadlineUnattainable      DEADLINE_UNATTAINABLE refused at admission, by estimate
    │   ├── DeadlinePassed            DEADLINE_PASSED       passed while queued or running
    │   └── RequestIncomplete         REQUEST_INCOMPLETE    the request did not arrive in time
    ├── OperationsFull                OPERATIONS_FULL       too many unfinished operations; cancel some, or wait
    ├── DirectionsFull                DIRECTIONS_FULL       too many or too large stored directions; delete some
    ├── OutOfMemory                   GPU_OUT_OF_MEMORY     too large for the device's memory even alone
    ├── PayloadTooLarge               PAYLOAD_TOO_LARGE     a message has more than ``max_message_bytes``
    ├── Cancelled                     CANCELLED             the caller cancelled or disconnected
    ├── MethodDisabled                METHOD_DISABLED       in the API, but not offered by this server
    ├── RpcUnknown                    RPC_UNKNOWN           not in the API of this server
    ├── StoreCorrupt                  STORE_CORRUPT         a stored object fails its checksum
    └── InternalError
        ├── ModelNonFinite            MODEL_NON_FINITE      NaN or infinite without an extreme value
        └── Bug                       BUG                   any other exception

The class attribute ``reason`` is sent as ``google.rpc.ErrorInfo.reason`` and is a label in the metrics; no other values
occur. ``rpc.responses.status`` maps these classes to gRPC status codes. All errors can be pickled, because the engine
process raises them and the front process reports them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


class UnderpaintError(Exception):
    """Base of all errors that reach a caller.

    ``message`` is for people: what is wrong and what to do. ``metadata`` is for programs and is sent in ErrorInfo.
    ``retry_after_s`` is sent as the retry delay of :class:`Unavailable`, in seconds; None means one second.
    """

    reason: ClassVar[str] = "BUG"

    def __init__(
        self, message: str, *, metadata: Mapping[str, str] | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.__dict__.copy())


def cause_of(error: BaseException) -> str:
    """Class and text of the exception that ``error`` was raised from, for operators only; empty if there is none."""
    cause = error.__cause__
    return "" if cause is None else f"{type(cause).__name__}: {cause}"


def forget_frames(error: BaseException) -> None:
    """Drop the frames of a handled error and of its causes.

    The frames refer to the request and its image, and often back to the error: they would stay until the garbage
    collector comes.
    """
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and one.__traceback__ is not None:
            one.__traceback__ = None
            left += (one.__cause__, one.__context__)


def _rebuild(kind: type[UnderpaintError], state: dict[str, object]) -> UnderpaintError:
    error = kind.__new__(kind, state["message"])
    error.__dict__.update(state)
    error.args = (state["message"],)
    return error


class InvalidRequest(UnderpaintError):
    """The request itself is wrong; repeating it fails again."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One invalid field: its path in the request, such as ``inversion_parameters.strength``, and what is wrong with
    it."""

    path: str
    description: str


class FieldInvalid(InvalidRequest):
    """One or more fields are out of range, missing, contradictory or unused; ``violations`` lists them."""

    reason = "FIELD_INVALID"

    def __init__(self, *violations: FieldViolation) -> None:
        super().__init__("; ".join(f"{v.path}: {v.description}" for v in violations))
        self.violations = violations


class RequestUndecodable(InvalidRequest):
    """The request is no message of the call's type, or the call has none or more than one where it must have one."""

    reason = "REQUEST_UNDECODABLE"


class ImageUndecodable(InvalidRequest):
    """The bytes are no PNG, JPEG or WebP image, are damaged, are an animation, or are of another type than
    ``media_type`` names."""

    reason = "IMAGE_UNDECODABLE"


class ImageTooLarge(InvalidRequest):
    """The image has too many bytes, pixels or parts, or needs too much memory or time to decode; metadata ``unit``,
    ``limit`` and ``actual``."""

    reason = "IMAGE_TOO_LARGE"


class NonFiniteLatents(InvalidRequest):
    """Latents, an image or a loss became NaN or infinite, and ``violations`` names the extreme values that were asked
    for. The engine turns one without violations into :class:`ModelNonFinite`."""

    reason = "NON_FINITE_LATENTS"

    def __init__(
        self,
        message: str,
        *,
        violations: tuple[FieldViolation, ...] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        extremes = "; ".join(f"{v.path}: {v.description}" for v in violations)
        super().__init__(
            f"{message} ({extremes})" if extremes else message, metadata=metadata, retry_after_s=retry_after_s
        )
        self.summary = message
        """The message without the violations."""
        self.violations = violations


class RequestIdReused(InvalidRequest):
    """The request_id was used before with another payload."""

    reason = "REQUEST_ID_REUSED"


class NotFound(UnderpaintError):
    """No such resource; metadata ``resource_type`` and ``resource_name``."""


class ModelNotFound(NotFound):
    """No such model; the message lists the models of this server."""

    reason = "MODEL_NOT_FOUND"


class InversionExpired(NotFound):
    """The inversion expired, was deleted, or was never made."""

    reason = "INVERSION_EXPIRED"


class DirectionNotFound(NotFound):
    """No such direction."""

    reason = "DIRECTION_NOT_FOUND"


class OperationNotFound(NotFound):
    """No such operation, or it was deleted, or it ended more than ``operation_ttl_s`` ago."""

    reason = "OPERATION_NOT_FOUND"


class PreconditionFailed(UnderpaintError):
    """The request is valid, but the server or the named resource is in a state that does not allow it."""


class InversionModelMismatch(PreconditionFailed):
    """The inversion was made with other weights. An exact one also needs equal device, dtype, threads and libraries:
    see ``jobs.ModelInfo.fingerprint``."""

    reason = "INVERSION_MODEL_MISMATCH"


class DirectionModelMismatch(PreconditionFailed):
    """The direction was learned with other model weights."""

    reason = "DIRECTION_MODEL_MISMATCH"


class DirectionStepsMismatch(PreconditionFailed):
    """The direction was learned for another number of steps, which metadata ``steps`` names."""

    reason = "DIRECTION_STEPS_MISMATCH"


class LearningUnsupported(PreconditionFailed):
    """The model has no CLIP to compute the directional loss with."""

    reason = "LEARNING_UNSUPPORTED"


class OperationRunning(PreconditionFailed):
    """The operation is not finished; only a finished one can be deleted."""

    reason = "OPERATION_RUNNING"


class ModelNotReady(PreconditionFailed):
    """The model failed to load; the message says why. Calls of other models are not affected.

    Callers see the message, so text of a library's exception is not in it: that exception is the cause, see
    :func:`cause_of`.
    """

    reason = "MODEL_NOT_READY"


class Conflict(UnderpaintError):
    """Another caller changed or created the resource first."""


class EtagMismatch(Conflict):
    """The etag in the request is not the resource's current one: it changed since it was read."""

    reason = "ETAG_MISMATCH"


class DirectionExists(Conflict):
    """The id belongs to a direction, or to an unfinished operation that learns one."""

    reason = "DIRECTION_EXISTS"


class Unavailable(UnderpaintError):
    """A temporary state of the server; the same request can be retried after ``retry_after_s`` seconds."""


class QueueFull(Unavailable):
    """``queue_capacity`` jobs are already waiting, or the requests in progress take ``request_bytes`` already."""

    reason = "QUEUE_FULL"


class Draining(Unavailable):
    """The server is shutting down and accepts no new work."""

    reason = "DRAINING"


class ModelLoading(Unavailable):
    """The engine process is still loading the models."""

    reason = "MODEL_LOADING"


class WorkerRestarted(Unavailable):
    """The engine process died while it ran this job, or is being restarted; or the process that decodes images was."""

    reason = "WORKER_RESTARTED"


class StoreUnavailable(Unavailable):
    """The object store of inversions, directions and operations is unreachable. Edits of an image in the request work
    without it."""

    reason = "STORE_UNAVAILABLE"


class DeadlineExceeded(UnderpaintError):
    """The call cannot finish, or did not finish, within the caller's deadline."""


class DeadlineUnattainable(DeadlineExceeded):
    """Refused at admission: the estimated time, metadata ``estimate_s`` in seconds, is longer than the deadline."""

    reason = "DEADLINE_UNATTAINABLE"


class DeadlinePassed(DeadlineExceeded):
    """The deadline passed while the job was queued or running."""

    reason = "DEADLINE_PASSED"


class RequestIncomplete(DeadlineExceeded):
    """The call's request did not arrive completely within the time that the server waits for it."""

    reason = "REQUEST_INCOMPLETE"


class OperationsFull(UnderpaintError):
    """``max_operations`` operations are unfinished already."""

    reason = "OPERATIONS_FULL"


class DirectionsFull(UnderpaintError):
    """The stored directions have reached ``max_directions`` or ``max_directions_bytes``; metadata ``entries`` and
    ``bytes``."""

    reason = "DIRECTIONS_FULL"


class OutOfMemory(UnderpaintError):
    """The job does not fit the device's memory even alone; metadata ``width`` and ``height`` in pixels."""

    reason = "GPU_OUT_OF_MEMORY"


class PayloadTooLarge(UnderpaintError):
    """A request or an answer has more bytes than a message may have; metadata ``unit``, ``limit`` and ``actual``."""

    reason = "PAYLOAD_TOO_LARGE"


class Cancelled(UnderpaintError):
    """The caller cancelled or disconnected."""

    reason = "CANCELLED"


class MethodDisabled(UnderpaintError):
    """The API has this RPC, but this server does not offer it; the message names the alternative."""

    reason = "METHOD_DISABLED"


class RpcUnknown(UnderpaintError):
    """The server has no RPC of this name; it may be older or newer than the client."""

    reason = "RPC_UNKNOWN"


class StoreCorrupt(UnderpaintError):
    """A stored object fails its checksum. A damaged inversion is deleted; a damaged direction stays until the caller
    deletes it."""

    reason = "STORE_CORRUPT"


class InternalError(UnderpaintError):
    """A failure of the server, not of the request."""


class ModelNonFinite(InternalError):
    """Latents, an image or a loss became NaN or infinite though nothing extreme was asked for: the checkpoint is
    damaged, or its numbers overflow in the server's ``dtype``."""

    reason = "MODEL_NON_FINITE"


class Bug(InternalError):
    """Any exception that is not in this tree; the server log has its traceback."""

    reason = "BUG"
