"""The errors that a call can raise, as one tree.

::

    UnderpaintError
    ├── InvalidRequest                the request is wrong; correct it, a retry fails again
    │   ├── FieldInvalid                  FIELD_INVALID: ``violations`` has the fields
    │   ├── RequestUndecodable            REQUEST_UNDECODABLE: not a message of the call's type
    │   ├── ImageUndecodable              IMAGE_UNDECODABLE
    │   ├── ImageTooLarge                 IMAGE_TOO_LARGE: ``metadata`` has limit and actual
    │   ├── NonFiniteLatents              NON_FINITE_LATENTS: ``violations`` has the extreme values
    │   └── RequestIdReused               REQUEST_ID_REUSED: the id came before with another payload
    ├── NotFound                      the server has no resource of that name
    │   ├── ModelNotFound                 MODEL_NOT_FOUND
    │   ├── InversionExpired              INVERSION_EXPIRED: expired, deleted, or it never existed
    │   ├── DirectionNotFound             DIRECTION_NOT_FOUND
    │   └── OperationNotFound             OPERATION_NOT_FOUND: deleted, or it never existed
    ├── PreconditionFailed            the request does not fit the state of the server
    │   ├── InversionModelMismatch        INVERSION_MODEL_MISMATCH: made with other weights
    │   ├── DirectionModelMismatch        DIRECTION_MODEL_MISMATCH: learned with other weights
    │   ├── DirectionStepsMismatch        DIRECTION_STEPS_MISMATCH: ``metadata`` has the direction's steps
    │   ├── LearningUnsupported           LEARNING_UNSUPPORTED: the model has no CLIP for the loss
    │   ├── OperationRunning              OPERATION_RUNNING: only an operation that is done can be deleted
    │   └── ModelNotReady                 MODEL_NOT_READY: loading failed
    ├── Unavailable                   all attempts failed; retry after ``retry_after_s``
    │   ├── QueueFull                     QUEUE_FULL
    │   ├── Draining                      DRAINING
    │   ├── ModelLoading                  MODEL_LOADING
    │   ├── WorkerRestarted               WORKER_RESTARTED
    │   ├── StoreUnavailable              STORE_UNAVAILABLE: the server cannot reach its store
    │   └── ConnectionFailed              no server answers, or the connection broke
    │       └── WrongTarget                   no server can answer at the target as it is written
    ├── DeadlineExceeded              the ``timeout`` is too short
    │   ├── DeadlineUnattainable          DEADLINE_UNATTAINABLE: refused at once, ``metadata`` has estimate_s
    │   ├── DeadlinePassed                DEADLINE_PASSED: it passed in the queue or while running
    │   └── RequestIncomplete             REQUEST_INCOMPLETE: sending the request took too long
    ├── ResourceExhausted             a limit is reached
    │   ├── OperationsFull                OPERATIONS_FULL: too many operations wait
    │   ├── DirectionsFull                DIRECTIONS_FULL: too many directions are stored; delete some
    │   ├── OutOfMemory                   GPU_OUT_OF_MEMORY: the image is too large for the device
    │   ├── QuotaExceeded                 QUOTA_EXCEEDED
    │   └── PayloadTooLarge               PAYLOAD_TOO_LARGE: ``metadata`` has limit and actual
    ├── Cancelled                     CANCELLED
    ├── Unauthenticated               TOKEN_INVALID
    ├── PermissionDenied              ROLE_REQUIRED
    ├── Conflict                      another caller created or changed the resource
    │   ├── EtagMismatch                  ETAG_MISMATCH: the resource has another etag
    │   └── DirectionExists               DIRECTION_EXISTS: the id is taken
    ├── MethodDisabled                METHOD_DISABLED: in the contract, but not offered by the server
    ├── RpcUnknown                    RPC_UNKNOWN: not in the contract of this server
    ├── DataLoss                      bytes were lost or changed
    │   ├── StoreCorrupt                  STORE_CORRUPT: a stored object fails its checksum
    │   └── ExportCorrupt                 a received export is incomplete or fails its checksum
    └── ServerError                   an error inside the server
        ├── ModelNonFinite                MODEL_NON_FINITE: NaN or infinite without an extreme value
        └── Bug                           BUG: any other error in the server

The words in capitals are ``reason``, from ``google.rpc.ErrorInfo``. An error with a reason that this client does not
know has the class of its status code. ``__cause__`` is the gRPC error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.message import Message


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of a request with a wrong value."""

    path: str
    """Path of the field in the request, such as ``inversion_parameters.strength``."""
    description: str
    """What is wrong with it."""


class UnderpaintError(Exception):
    """Base of all errors of a call. ``str()`` is the message; programs read the attributes."""

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
        request_id: str = "",
        details: "tuple[Message, ...]" = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        """What is wrong, and what to do."""
        self.reason = reason
        """Machine-readable reason, one of the words in capitals above; empty if the server sent none."""
        self.metadata = dict(metadata or {})
        """Values that belong to the reason, such as ``limit`` and ``actual``."""
        self.violations = violations
        """Fields with a wrong value."""
        self.retry_after_s = retry_after_s
        """Seconds to wait before a retry; None if the server sent none."""
        self.request_id = request_id
        """Request id, to find the request in the server's log; empty if it had none."""
        self.details = details
        """All ``google.rpc`` details of the error."""
        self._answer_lost = False  # whether an earlier attempt of the call may have been carried out

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.__dict__.copy())


def _rebuild(kind: type[UnderpaintError], state: dict[str, object]) -> UnderpaintError:
    error = kind(str(state["message"]))
    error.__dict__.update(state)
    return error


class InvalidRequest(UnderpaintError):
    """The request is wrong; correct it before the next call."""


class FieldInvalid(InvalidRequest):
    """Fields are out of range, missing, contradictory or unused; ``violations`` names them."""


class RequestUndecodable(InvalidRequest):
    """The server could not read the request: it is not a message of the call's type."""


class ImageUndecodable(InvalidRequest):
    """The bytes are not a PNG, JPEG or WebP image, or the image is damaged or an animation."""


class ImageTooLarge(InvalidRequest):
    """The image has too many bytes, pixels or parts, sides too unlike, or takes too much memory or time to decode;
    ``metadata`` has ``unit``, ``limit`` and ``actual``."""


class NonFiniteLatents(InvalidRequest):
    """Extreme values made the latents NaN or infinite; ``violations`` names them."""


class RequestIdReused(InvalidRequest):
    """The request id was used before with another payload; use a new one."""


class NotFound(UnderpaintError):
    """The server has no resource of that name."""


class ModelNotFound(NotFound):
    """The server has no such model; ``Client.models()`` lists its models."""


class InversionExpired(NotFound):
    """The inversion has expired, was deleted, or never existed; invert the photo again."""


class DirectionNotFound(NotFound):
    """The server has no such direction; ``Client.list_directions()`` lists its directions."""


class OperationNotFound(NotFound):
    """The operation was deleted or never existed; ``Client.list_operations()`` lists the operations."""


class PreconditionFailed(UnderpaintError):
    """The request does not fit the state of the server."""


class InversionModelMismatch(PreconditionFailed):
    """The inversion was made with other weights, or (EDICT) by a server that rounds differently; invert again."""


class DirectionModelMismatch(PreconditionFailed):
    """The direction was learned with other weights; learn it again."""


class DirectionStepsMismatch(PreconditionFailed):
    """The direction was learned for another number of steps, which ``metadata`` has; leave ``steps`` out."""


class LearningUnsupported(PreconditionFailed):
    """The model has no CLIP, which the loss of learning needs; use another model."""


class OperationRunning(PreconditionFailed):
    """The operation is not done; cancel it before deleting it."""


class ModelNotReady(PreconditionFailed):
    """The model failed to load; ``Model.error`` has the reason."""


class Unavailable(UnderpaintError):
    """The server cannot take the request now; retry after ``retry_after_s`` seconds."""


class QueueFull(Unavailable):
    """The server's queue is full."""


class Draining(Unavailable):
    """The server is stopping and takes no more requests."""


class ModelLoading(Unavailable):
    """The model's weights are still being loaded."""


class WorkerRestarted(Unavailable):
    """The engine process crashed while this request ran, and is restarting."""


class StoreUnavailable(Unavailable):
    """The server cannot reach its store. Edits of a photo work without it."""


class ConnectionFailed(Unavailable):
    """No server answers at the target, or the connection broke."""


class WrongTarget(ConnectionFailed):
    """The target is not an address, no host has its name, or what is there speaks TLS, plain text or no gRPC."""


class DeadlineExceeded(UnderpaintError):
    """The call takes longer than its ``timeout``."""


class DeadlineUnattainable(DeadlineExceeded):
    """The server estimates that the call would take longer than its ``timeout``; ``metadata`` has ``estimate_s``."""


class DeadlinePassed(DeadlineExceeded):
    """The ``timeout`` passed while the request was in the queue or running."""


class RequestIncomplete(DeadlineExceeded):
    """The request did not arrive within the time that the server waits for it: the connection is too slow."""


class ResourceExhausted(UnderpaintError):
    """A limit of the server or of this caller is reached."""


class OperationsFull(ResourceExhausted):
    """The server takes no more operations; cancel some, or retry later."""


class DirectionsFull(ResourceExhausted):
    """Too many directions are stored, or they take too many bytes; delete some."""


class OutOfMemory(ResourceExhausted):
    """The image needs more memory than the device has; use a smaller one."""


class QuotaExceeded(ResourceExhausted):
    """The quota of this caller is used up."""


class PayloadTooLarge(ResourceExhausted):
    """The message is larger than 24 MiB, or than a smaller limit of a proxy; send a smaller image."""


class Cancelled(UnderpaintError):
    """The call was cancelled."""


class Unauthenticated(UnderpaintError):
    """The credential is missing or wrong."""


class PermissionDenied(UnderpaintError):
    """The credential does not permit this call."""


class Conflict(UnderpaintError):
    """Another caller created or changed the resource."""


class EtagMismatch(Conflict):
    """The resource has another etag than the call names; fetch it again."""


class DirectionExists(Conflict):
    """The id belongs to a direction, or to one that is being learned; choose another."""


class MethodDisabled(UnderpaintError):
    """The contract has this call, but the server does not offer it."""


class RpcUnknown(UnderpaintError):
    """The server does not have this call; it is older or newer than this client."""


class DataLoss(UnderpaintError):
    """Bytes were lost or changed."""


class StoreCorrupt(DataLoss):
    """A stored object fails its checksum."""


class ExportCorrupt(DataLoss):
    """The received export is incomplete or fails its checksum; export again."""


class ServerError(UnderpaintError):
    """An error inside the server; its log has the details under ``request_id``."""


class ModelNonFinite(ServerError):
    """Numbers became NaN or infinite though nothing extreme was asked for: the server's model or its dtype is at
    fault."""


class Bug(ServerError):
    """An error that the server has no class for."""
