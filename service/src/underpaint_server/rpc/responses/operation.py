"""Operations as messages, and their outcomes as the bytes in the store."""

from google.longrunning import operations_pb2
from google.protobuf.message import DecodeError

from underpaint_server.errors import StoreCorrupt, UnderpaintError
from underpaint_server.jobs import Phase, Progress
from underpaint_server.rpc.responses.common import progress
from underpaint_server.rpc.responses.direction import direction
from underpaint_server.rpc.responses.status import rich_status
from underpaint_server.stores.directions import Entry
from underpaint_server.wire.names import operation_name


def unfinished(name: str, now: Progress, loss: float | None) -> operations_pb2.Operation:
    """An operation that is not done, with its progress as metadata."""
    operation = operations_pb2.Operation(name=operation_name(name))
    operation.metadata.Pack(progress(now, loss))
    return operation


def succeeded(name: str, entry: Entry) -> operations_pb2.Operation:
    """A done operation that learned this direction."""
    steps = entry.direction.options.method.optimization_steps
    done = Progress(Phase.OPTIMIZING, steps, steps, 1.0)
    operation = unfinished(name, done, entry.direction.losses[-1] if entry.direction.losses else None)
    operation.done = True
    operation.response.Pack(direction(entry))
    return operation


def failed(name: str, error: UnderpaintError, request_id: str) -> operations_pb2.Operation:
    """A done operation that failed or was cancelled."""
    operation = operations_pb2.Operation(name=operation_name(name), done=True)
    operation.error.CopyFrom(rich_status(error, request_id))
    return operation


def parsed(data: bytes) -> operations_pb2.Operation:
    """The operation in a stored outcome; raises StoreCorrupt."""
    try:
        return operations_pb2.Operation.FromString(data)
    except DecodeError as error:
        raise StoreCorrupt("the stored outcome of the operation cannot be read") from error


class OperationEncoder:
    """Implements :class:`underpaint_server.operations.runner.Encoder`."""

    def succeeded(self, name: str, entry: Entry) -> bytes:
        """The outcome of an operation that learned this direction."""
        return bytes(succeeded(name, entry).SerializeToString())

    def failed(self, name: str, error: UnderpaintError, request_id: str) -> bytes:
        """The outcome of an operation that failed with this error, or was cancelled."""
        return bytes(failed(name, error, request_id).SerializeToString())

    def is_error(self, data: bytes) -> bool:
        """Whether this outcome is a failure; raises StoreCorrupt."""
        return bool(parsed(data).HasField("error"))
