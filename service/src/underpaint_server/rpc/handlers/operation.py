"""The current state of an operation, whichever server of the store runs it."""

from google.longrunning import operations_pb2

from underpaint_server.errors import StoreCorrupt
from underpaint_server.jobs import Phase, Progress
from underpaint_server.rpc.context import ServerContext
from underpaint_server.rpc.responses.operation import parsed, unfinished
from underpaint_server.stores.operations import OperationSummary
from underpaint_server.wire.names import operation_name


async def current_operation(server: ServerContext, name: str) -> operations_pb2.Operation:
    """The current state of one operation. Raises OperationNotFound, StoreCorrupt."""
    return await operation_message(server, await server.stores.operations.summary(name))


async def operation_message(server: ServerContext, summary: OperationSummary) -> operations_pb2.Operation:
    """The current state of an operation whose summary is known. Raises StoreCorrupt."""
    try:
        outcome = await server.stores.operations.outcome(summary.name) if summary.done_at is not None else None
        if outcome is not None:
            return parsed(outcome)
        own_progress = server.manager.progress(summary.name)
        return unfinished(summary.name, *(own_progress or await _stored_progress(server, summary)))
    except StoreCorrupt as error:
        name = operation_name(summary.name)
        raise StoreCorrupt(
            f"{name} is damaged: cancel and delete it, then learn again ({error.message})",
            metadata={"resource_name": name},
        ) from error


async def _stored_progress(server: ServerContext, summary: OperationSummary) -> tuple[Progress, float | None]:
    """Progress and loss at the last stored state, for an operation that this server does not run."""
    task, state = await server.stores.operations.task(summary.name), await server.stores.operations.state_of(summary)
    total = task.options.method.optimization_steps if task is not None else 0
    if state is None:
        return Progress(Phase.QUEUED, 0, total, 0.0), None
    fraction = state.iteration / max(1, total)
    return Progress(Phase.OPTIMIZING, state.iteration, total, fraction), state.losses[-1] if state.losses else None
