"""Every way a call can fail, as one tree.

::

    UnderpaintError
    ├── InvalidRequest                the request itself is wrong; sending it again will not help
    │   ├── FieldInvalid                  FIELD_INVALID: ``violations`` names the fields
    │   ├── ImageUndecodable              IMAGE_UNDECODABLE
    │   ├── ImageTooLarge                 IMAGE_TOO_LARGE: ``metadata`` has limit and actual
    │   └── RequestIdReused               REQUEST_ID_REUSED: same id, other payload
    ├── NotFound                      a name that means nothing to this server, or not to this caller
    │   ├── ModelNotFound                 MODEL_NOT_FOUND
    │   ├── InversionExpired              INVERSION_EXPIRED: gone, or never was
    │   ├── DirectionNotFound             DIRECTION_NOT_FOUND
    │   └── OperationNotFound             OPERATION_NOT_FOUND: forgotten, or never was
    ├── PreconditionFailed            right request, wrong state
    │   ├── InversionModelMismatch        INVERSION_MODEL_MISMATCH
    │   ├── DirectionModelMismatch        DIRECTION_MODEL_MISMATCH: learned on other weights
    │   ├── DirectionStepsMismatch        DIRECTION_STEPS_MISMATCH: ``metadata`` has the direction's steps
    │   ├── LearningUnsupported           LEARNING_UNSUPPORTED: the model has nothing to learn by
    │   ├── OperationRunning              OPERATION_RUNNING: only one that is done can be deleted
    │   └── ModelNotReady                 MODEL_NOT_READY
    ├── Unavailable                   the channel tried several times; come back after ``retry_after_s``
    │   ├── QueueFull                     QUEUE_FULL
    │   ├── Draining                      DRAINING
    │   ├── ModelLoading                  MODEL_LOADING
    │   ├── WorkerRestarted               WORKER_RESTARTED
    │   ├── StoreUnavailable              STORE_UNAVAILABLE: what is stored is out of the server's reach
    │   └── ConnectionFailed              nobody answers, or the connection broke
    ├── DeadlineExceeded
    │   ├── DeadlineUnattainable          DEADLINE_UNATTAINABLE: refused at once, ``metadata`` has estimate_s
    │   └── DeadlinePassed                DEADLINE_PASSED: while waiting or running
    ├── ResourceExhausted
    │   ├── OperationsFull                OPERATIONS_FULL: too many wait already
    │   ├── OutOfMemory                   GPU_OUT_OF_MEMORY: does not fit even alone
    │   ├── QuotaExceeded                 QUOTA_EXCEEDED
    │   └── PayloadTooLarge               the encoded message is over the transport's limit
    ├── Cancelled                     CANCELLED
    ├── Unauthenticated               TOKEN_INVALID
    ├── PermissionDenied              ROLE_REQUIRED
    ├── Conflict                      somebody else was first
    │   ├── EtagMismatch                  ETAG_MISMATCH: it is not what this caller has seen
    │   └── DirectionExists               DIRECTION_EXISTS: the id is taken
    ├── MethodDisabled                METHOD_DISABLED: in the contract, not on this server
    ├── DataLoss
    │   ├── StoreCorrupt                  STORE_CORRUPT: what was stored fails its checksum
    │   └── ExportCorrupt                 an export arrived incomplete or changed
    └── ServerError                   the server's own fault
        ├── NonFiniteLatents              NON_FINITE_LATENTS
        └── Bug                           BUG

The words in capitals are ``reason``, from ``google.rpc.ErrorInfo``. A reason that this client does not know ends in the
class of its status code. The gRPC error itself is the ``__cause__``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.message import Message


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field at fault."""

    path: str
    """Path in the request, such as ``inversion_parameters.strength``."""
    description: str
    """What is wrong with it."""


class UnderpaintError(Exception):
    """Root of the tree; ``str()`` is for people, the attributes are for programs."""

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
        """For people; says what to do next."""
        self.reason = reason
        """From a closed list; empty when no server said one."""
        self.metadata = dict(metadata or {})
        """Facts that belong to the reason, such as ``limit`` and ``actual``."""
        self.violations = violations
        """Fields at fault."""
        self.retry_after_s = retry_after_s
        """Seconds after which the server wants to be asked again."""
        self.request_id = request_id
        """Names the request in the server's log."""
        self.details = details
        """All ``google.rpc`` details that came with it."""

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.__dict__.copy())


def _rebuild(kind: type[UnderpaintError], state: dict[str, object]) -> UnderpaintError:
    error = kind(str(state["message"]))
    error.__dict__.update(state)
    return error


class InvalidRequest(UnderpaintError):
    """The request is wrong by itself."""


class FieldInvalid(InvalidRequest):
    """Fields out of range, missing, contradictory or unused; see ``violations``."""


class ImageUndecodable(InvalidRequest):
    """Not a PNG, JPEG or WebP picture, or one cut short."""


class ImageTooLarge(InvalidRequest):
    """Too many bytes or pixels; ``metadata`` has ``limit`` and ``actual``."""


class RequestIdReused(InvalidRequest):
    """A request id that came before with another payload."""


class NotFound(UnderpaintError):
    """A name that means nothing."""


class ModelNotFound(NotFound):
    """No such model; ``Client.models()`` lists those that exist."""


class InversionExpired(NotFound):
    """No such inversion, or no longer; invert the photo again."""


class DirectionNotFound(NotFound):
    """No such direction; ``Client.list_directions()`` lists those that exist."""


class OperationNotFound(NotFound):
    """No such operation, or it was forgotten."""


class PreconditionFailed(UnderpaintError):
    """The request fits another state of the server."""


class InversionModelMismatch(PreconditionFailed):
    """The inversion was made by other weights, or an exact one by a server that computes otherwise; invert again."""


class DirectionModelMismatch(PreconditionFailed):
    """The direction was learned on other weights; learn it again."""


class DirectionStepsMismatch(PreconditionFailed):
    """The direction was learned for another number of steps, which ``metadata`` has."""


class LearningUnsupported(PreconditionFailed):
    """The model came without what scores an edit."""


class OperationRunning(PreconditionFailed):
    """The operation is not done; cancel it first."""


class ModelNotReady(PreconditionFailed):
    """The model failed to load."""


class Unavailable(UnderpaintError):
    """Nothing is wrong with the request; ``retry_after_s`` says when to come back."""


class QueueFull(Unavailable):
    """The queue has no place."""


class Draining(Unavailable):
    """The server is about to stop."""


class ModelLoading(Unavailable):
    """Weights are still being read."""


class WorkerRestarted(Unavailable):
    """The worker died with this work in it and is coming back."""


class StoreUnavailable(Unavailable):
    """The server cannot reach the place of what it stores; edits of an image work all the same."""


class ConnectionFailed(Unavailable):
    """Nobody answers at the target, or the connection broke."""


class DeadlineExceeded(UnderpaintError):
    """The call's ``timeout``."""


class DeadlineUnattainable(DeadlineExceeded):
    """Cannot finish in time, by the server's estimate; ``metadata`` has ``estimate_s``."""


class DeadlinePassed(DeadlineExceeded):
    """It passed while the work was waiting or running."""


class ResourceExhausted(UnderpaintError):
    """More than there is."""


class OperationsFull(ResourceExhausted):
    """As many operations wait as the server takes; cancel some, or come back."""


class OutOfMemory(ResourceExhausted):
    """The picture does not fit the device even alone."""


class QuotaExceeded(ResourceExhausted):
    """The caller's share is used up."""


class PayloadTooLarge(ResourceExhausted):
    """The message is over the transport's limit of 24 MiB, or a smaller one on the way."""


class Cancelled(UnderpaintError):
    """The call was cancelled."""


class Unauthenticated(UnderpaintError):
    """No credential, or a wrong one."""


class PermissionDenied(UnderpaintError):
    """The credential does not allow this."""


class Conflict(UnderpaintError):
    """Somebody else changed or made the resource first."""


class EtagMismatch(Conflict):
    """The resource is not the one this caller has seen; look again."""


class DirectionExists(Conflict):
    """The id is taken, by a direction or by one that is being learned; choose another."""


class MethodDisabled(UnderpaintError):
    """Part of the contract, not of this server."""


class DataLoss(UnderpaintError):
    """Bytes were lost or changed."""


class StoreCorrupt(DataLoss):
    """What was stored fails its checksum."""


class ExportCorrupt(DataLoss):
    """An export arrived incomplete or changed; export again."""


class ServerError(UnderpaintError):
    """The server's own fault; ``request_id`` finds it in the server's log."""


class NonFiniteLatents(ServerError):
    """The computation left the range of numbers."""


class Bug(ServerError):
    """Something the server did not foresee."""
