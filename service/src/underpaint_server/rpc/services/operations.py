"""The google.longrunning.Operations service: the progress and results of learning."""

# ruff: noqa: N802, ARG002 (methods and their arguments are the contract's)

import re
import time
from typing import Final

from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.empty_pb2 import Empty

from underpaint_server.errors import FieldInvalid, FieldViolation, OperationRunning, StoreCorrupt
from underpaint_server.rpc.calls.messages import Context
from underpaint_server.rpc.context import ServerContext
from underpaint_server.rpc.handlers.operation import current_operation, operation_message
from underpaint_server.rpc.responses.operation import failed
from underpaint_server.stores.operations import OperationSummary
from underpaint_server.stores.paging import key_of, token_of
from underpaint_server.wire.fields import page_size
from underpaint_server.wire.names import operation_id

_FILTER: Final = re.compile(r"\s*done\s*=\s*(true|false)\s*")
_POLL_S: Final = 0.25
_MAX_POLL_S: Final = 2.0
_ANSWER_S: Final = 0.2
"""Seconds of the caller's deadline that are reserved for the answer to arrive."""


class OperationsService(operations_pb2_grpc.OperationsServicer):  # type: ignore[misc]  # the library has no types
    """Reads, waits for, cancels and deletes operations, whichever server of the store runs them."""

    def __init__(self, server: ServerContext) -> None:
        self._server = server

    async def GetOperation(
        self, request: operations_pb2.GetOperationRequest, context: Context
    ) -> operations_pb2.Operation:
        """Return the current state of one operation."""
        return await current_operation(self._server, operation_id(request.name, "name"))

    async def ListOperations(
        self, request: operations_pb2.ListOperationsRequest, context: Context
    ) -> operations_pb2.ListOperationsResponse:
        """Return one page of operations, newest first; the filter is empty, ``done=true`` or ``done=false``."""
        size, wanted = page_size(request.page_size), _filter(request)
        before = key_of(request.page_token) if request.page_token else None
        summaries = (await self._server.stores.operations.scan()).values()
        chosen = [summary for summary in summaries if wanted is None or wanted is (summary.done_at is not None)]
        keys = sorted(((summary.create_time, summary.name) for summary in chosen), reverse=True)
        left = keys if before is None else [key for key in keys if key < before]
        by_name = {summary.name: summary for summary in chosen}
        page = [await self._listed(by_name[name]) for _, name in left[:size]]
        token = token_of(left[size - 1]) if len(left) > size else ""
        return operations_pb2.ListOperationsResponse(operations=page, next_page_token=token)

    async def WaitOperation(
        self, request: operations_pb2.WaitOperationRequest, context: Context
    ) -> operations_pb2.Operation:
        """Wait until the operation is done and return it.

        Returns its current state earlier: at the timeout, shortly before the deadline, or when the server shuts down.
        """
        name, end = operation_id(request.name, "name"), _end_of(request, context)
        poll_s = _POLL_S
        manager = self._server.manager
        while not (now := await current_operation(self._server, name)).done and (left_s := end - time.monotonic()) > 0:
            if manager.closed:
                break
            await manager.wait_for_end(min(left_s, poll_s))
            poll_s = min(2 * poll_s, _MAX_POLL_S)
        return now

    async def CancelOperation(self, request: operations_pb2.CancelOperationRequest, context: Context) -> Empty:
        """Cancel one operation within a step; its state is discarded. An operation that is done is not changed."""
        summary = await self._server.stores.operations.summary(operation_id(request.name, "name"))
        await self._server.manager.cancel(summary)
        return Empty()

    async def DeleteOperation(self, request: operations_pb2.DeleteOperationRequest, context: Context) -> Empty:
        """Delete one operation that is done."""
        summary = await self._server.stores.operations.summary(operation_id(request.name, "name"))
        if summary.done_at is None:
            raise OperationRunning(
                f"{request.name} is not done; cancel it first", metadata={"resource_name": request.name}
            )
        await self._server.stores.operations.forget(summary)
        return Empty()

    async def _listed(self, summary: OperationSummary) -> operations_pb2.Operation:
        """An operation of a page; a damaged one is shown as failed."""
        try:
            return await operation_message(self._server, summary)
        except StoreCorrupt as error:
            return failed(summary.name, error, "")


def _filter(request: operations_pb2.ListOperationsRequest) -> bool | None:
    violations = []
    if request.name not in ("", "operations"):
        violations.append(FieldViolation("name", "must be empty or operations"))
    match = _FILTER.fullmatch(request.filter)
    if request.filter and match is None:
        violations.append(FieldViolation("filter", "must be empty, done=true or done=false"))
    if violations:
        raise FieldInvalid(*violations)
    return None if match is None else match[1] == "true"


def _end_of(request: operations_pb2.WaitOperationRequest, context: Context) -> float:
    """When to answer at the latest, as a value of ``time.monotonic()``."""
    limits = []
    if request.HasField("timeout"):
        limits.append(request.timeout.ToNanoseconds() / 1e9)
    left_s = context.time_remaining()
    if left_s is not None:
        limits.append(left_s - _ANSWER_S)
    return time.monotonic() + min(limits, default=float("inf"))
