"""Every failure a caller can meet, as one tree.

::

    UnderpaintError
    ├── InvalidRequest            the request itself is wrong; sending it again will not help
    │   ├── FieldInvalid              FIELD_INVALID         one or more fields, each with its path
    │   ├── ImageUndecodable          IMAGE_UNDECODABLE
    │   ├── ImageTooLarge             IMAGE_TOO_LARGE
    │   └── RequestIdReused           REQUEST_ID_REUSED     same id, other payload
    ├── NotFound                  the name means nothing here (or to this caller)
    │   ├── ModelNotFound             MODEL_NOT_FOUND
    │   ├── InversionExpired          INVERSION_EXPIRED     gone, or never was
    │   ├── DirectionNotFound         DIRECTION_NOT_FOUND
    │   └── OperationNotFound         OPERATION_NOT_FOUND   forgotten, or never was
    ├── PreconditionFailed        right request, wrong state
    │   ├── InversionModelMismatch    INVERSION_MODEL_MISMATCH
    │   ├── DirectionModelMismatch    DIRECTION_MODEL_MISMATCH
    │   ├── DirectionStepsMismatch    DIRECTION_STEPS_MISMATCH
    │   ├── LearningUnsupported       LEARNING_UNSUPPORTED  the model has nothing to learn by
    │   ├── OperationRunning          OPERATION_RUNNING     only one that is done can be deleted
    │   └── ModelNotReady             MODEL_NOT_READY       the model failed to load
    ├── Conflict                  somebody else was first
    │   ├── EtagMismatch              ETAG_MISMATCH
    │   └── DirectionExists           DIRECTION_EXISTS
    ├── Unavailable               try again after ``retry_after_s``
    │   ├── QueueFull                 QUEUE_FULL
    │   ├── Draining                  DRAINING
    │   ├── ModelLoading              MODEL_LOADING
    │   ├── WorkerRestarted           WORKER_RESTARTED
    │   └── StoreUnavailable          STORE_UNAVAILABLE     the place of what is stored is out of reach
    ├── DeadlineExceeded
    │   ├── DeadlineUnattainable      DEADLINE_UNATTAINABLE refused at admission, with the estimate
    │   └── DeadlinePassed            DEADLINE_PASSED       while queued or running
    ├── OperationsFull                OPERATIONS_FULL       too many wait already; cancel some, or wait
    ├── OutOfMemory                   GPU_OUT_OF_MEMORY     does not fit the device even alone
    ├── Cancelled                     CANCELLED             the caller went away
    ├── MethodDisabled                METHOD_DISABLED       part of the contract, not of this server
    ├── StoreCorrupt                  STORE_CORRUPT         what was stored fails its checksum
    └── InternalError
        ├── NonFiniteLatents          NON_FINITE_LATENTS
        └── Bug                       BUG                   anything unforeseen

The class attribute ``reason`` is the closed list that reaches ``google.rpc.ErrorInfo.reason`` and the metrics;
``rpc.status`` has the one table from these classes to gRPC codes. All errors survive pickling, because the engine
process raises them and the front reports them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


class UnderpaintError(Exception):
    """Root of the tree. ``message`` is for people and says what to do next; ``metadata`` is for programs."""

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


def _rebuild(kind: type[UnderpaintError], state: dict[str, object]) -> UnderpaintError:
    error = kind.__new__(kind, state["message"])
    error.__dict__.update(state)
    error.args = (state["message"],)
    return error


class InvalidRequest(UnderpaintError):
    """The request is wrong by itself."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field at fault: its path in the request as sent, such as ``inversion_parameters.strength``, and why."""

    path: str
    description: str


class FieldInvalid(InvalidRequest):
    """Fields out of range, missing, contradictory or unused."""

    reason = "FIELD_INVALID"

    def __init__(self, *violations: FieldViolation) -> None:
        super().__init__("; ".join(f"{v.path}: {v.description}" for v in violations))
        self.violations = violations


class ImageUndecodable(InvalidRequest):
    """Not a picture of the accepted kinds, cut short, or of another type than declared."""

    reason = "IMAGE_UNDECODABLE"


class ImageTooLarge(InvalidRequest):
    """Too many bytes or pixels; metadata ``limit`` and ``actual``."""

    reason = "IMAGE_TOO_LARGE"


class RequestIdReused(InvalidRequest):
    """A request id that came before with another payload."""

    reason = "REQUEST_ID_REUSED"


class NotFound(UnderpaintError):
    """A name that means nothing; metadata ``resource_type`` and ``resource_name``."""


class ModelNotFound(NotFound):
    """No such model; the message lists those that exist."""

    reason = "MODEL_NOT_FOUND"


class InversionExpired(NotFound):
    """No such inversion, or no longer."""

    reason = "INVERSION_EXPIRED"


class DirectionNotFound(NotFound):
    """No such direction."""

    reason = "DIRECTION_NOT_FOUND"


class OperationNotFound(NotFound):
    """No such operation, or it was deleted, or it ended too long ago."""

    reason = "OPERATION_NOT_FOUND"


class PreconditionFailed(UnderpaintError):
    """The request fits another state of the server."""


class InversionModelMismatch(PreconditionFailed):
    """The inversion was made by other weights, or an exact one by another function of them."""

    reason = "INVERSION_MODEL_MISMATCH"


class DirectionModelMismatch(PreconditionFailed):
    """The direction was learned on other weights."""

    reason = "DIRECTION_MODEL_MISMATCH"


class DirectionStepsMismatch(PreconditionFailed):
    """The direction was learned for another number of steps; metadata ``steps`` has it."""

    reason = "DIRECTION_STEPS_MISMATCH"


class LearningUnsupported(PreconditionFailed):
    """The model came without what scores an edit."""

    reason = "LEARNING_UNSUPPORTED"


class OperationRunning(PreconditionFailed):
    """The operation is not done."""

    reason = "OPERATION_RUNNING"


class ModelNotReady(PreconditionFailed):
    """The model failed to load; the message says why."""

    reason = "MODEL_NOT_READY"


class Conflict(UnderpaintError):
    """Somebody else changed or made the resource first."""


class EtagMismatch(Conflict):
    """The resource is not the one the caller has seen."""

    reason = "ETAG_MISMATCH"


class DirectionExists(Conflict):
    """The id is taken, by a direction or by an operation that learns one."""

    reason = "DIRECTION_EXISTS"


class Unavailable(UnderpaintError):
    """Nothing is wrong with the request; ``retry_after_s`` says when to come back."""


class QueueFull(Unavailable):
    """The bounded queue has no place."""

    reason = "QUEUE_FULL"


class Draining(Unavailable):
    """The server is about to stop and takes nothing new."""

    reason = "DRAINING"


class ModelLoading(Unavailable):
    """Weights are still being read."""

    reason = "MODEL_LOADING"


class WorkerRestarted(Unavailable):
    """The engine process died with this work in it and is coming back."""

    reason = "WORKER_RESTARTED"


class StoreUnavailable(Unavailable):
    """The place where inversions, directions and operations live does not answer; edits that start from an image go on
    without it."""

    reason = "STORE_UNAVAILABLE"


class DeadlineExceeded(UnderpaintError):
    """The caller's deadline."""


class DeadlineUnattainable(DeadlineExceeded):
    """Cannot finish in time, by estimate; metadata ``estimate_s``."""

    reason = "DEADLINE_UNATTAINABLE"


class DeadlinePassed(DeadlineExceeded):
    """It passed while the work was queued or running."""

    reason = "DEADLINE_PASSED"


class OperationsFull(UnderpaintError):
    """As many operations wait as the server takes."""

    reason = "OPERATIONS_FULL"


class OutOfMemory(UnderpaintError):
    """Does not fit the device even alone; metadata ``width`` and ``height``."""

    reason = "GPU_OUT_OF_MEMORY"


class Cancelled(UnderpaintError):
    """The caller went away, or cancelled."""

    reason = "CANCELLED"


class MethodDisabled(UnderpaintError):
    """In the contract, not in this server."""

    reason = "METHOD_DISABLED"


class StoreCorrupt(UnderpaintError):
    """What was stored fails its checksum. A damaged inversion is gone then; a direction stays until it is deleted."""

    reason = "STORE_CORRUPT"


class InternalError(UnderpaintError):
    """Our fault."""


class NonFiniteLatents(InternalError):
    """A latent became NaN or infinite."""

    reason = "NON_FINITE_LATENTS"


class Bug(InternalError):
    """Anything unforeseen; the log has the traceback."""

    reason = "BUG"
