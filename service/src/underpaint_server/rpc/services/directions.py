"""The DirectionService."""

# ruff: noqa: N802, ARG002 (methods and their arguments are the contract's)

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Final

import google_crc32c
from google.longrunning import operations_pb2
from underpaint.v1 import direction_service_pb2 as messages
from underpaint.v1 import direction_service_pb2_grpc, types_pb2

from underpaint_server.errors import (
    DirectionExists,
    Draining,
    FieldInvalid,
    FieldViolation,
    OperationsFull,
    RequestIdReused,
    StoreCorrupt,
)
from underpaint_server.jobs import Descent, Direction, Generated, Picture
from underpaint_server.plans import learning_rows
from underpaint_server.rpc import handlers
from underpaint_server.rpc.calls.messages import Context
from underpaint_server.rpc.context import ServerContext
from underpaint_server.rpc.handlers.operation import current_operation
from underpaint_server.rpc.handlers.source import Fetcher
from underpaint_server.rpc.requests.learn import MAX_DISPLAY_CHARS, LearnDraft, learn_draft
from underpaint_server.rpc.responses.common import file_chunks
from underpaint_server.rpc.responses.direction import direction
from underpaint_server.stores import directions as files
from underpaint_server.stores.operations import OperationSummary, Task
from underpaint_server.wire.fields import Fields, page_size
from underpaint_server.wire.names import direction_id, direction_name

_FULL_RETRY_S: Final = 30.0


class DirectionService(direction_service_pb2_grpc.DirectionServiceServicer):
    """Learns and stores directions. Methods raise errors of :mod:`underpaint_server.errors`."""

    def __init__(self, server: ServerContext) -> None:
        self._server = server
        self._accepting = asyncio.Lock()

    async def LearnDirection(
        self, request: messages.LearnDirectionRequest, context: Context
    ) -> messages.LearnDirectionResponse:
        """Store the operation and return it; it runs afterwards."""
        if self._server.draining:
            raise Draining("this server is shutting down; retry the call, another server takes it", retry_after_s=1.0)
        model = self._server.model(request.direction.model, "direction.model")
        draft = learn_draft(request, model, self._server.settings)
        digest = (await handlers.fingerprint(self._server, "learn", request)).hex()
        known = await self._again(draft, digest)
        return messages.LearnDirectionResponse(operation=known or await self._start(request, draft, digest))

    async def GetDirection(
        self, request: messages.GetDirectionRequest, context: Context
    ) -> messages.GetDirectionResponse:
        """Return one direction."""
        entry = await self._server.stores.directions.get(direction_id(request.name, "name"))
        return messages.GetDirectionResponse(direction=direction(entry))

    async def ListDirections(
        self, request: messages.ListDirectionsRequest, context: Context
    ) -> messages.ListDirectionsResponse:
        """Return one page of directions, newest first."""
        entries, token = await self._server.stores.directions.list(page_size(request.page_size), request.page_token)
        return messages.ListDirectionsResponse(
            directions=[direction(entry) for entry in entries], next_page_token=token
        )

    async def DeleteDirection(
        self, request: messages.DeleteDirectionRequest, context: Context
    ) -> messages.DeleteDirectionResponse:
        """Delete one direction."""
        await self._server.stores.directions.delete(direction_id(request.name, "name"), request.etag)
        return messages.DeleteDirectionResponse()

    async def ExportDirection(
        self, request: messages.ExportDirectionRequest, context: Context
    ) -> AsyncIterator[messages.ExportDirectionResponse]:
        """Stream the safetensors file in chunks."""
        data = await self._server.stores.directions.export(direction_id(request.name, "name"))
        for chunk in file_chunks(messages.ExportDirectionResponse, data):
            yield chunk

    async def ImportDirection(
        self, request_iterator: AsyncIterator[messages.ImportDirectionRequest], context: Context
    ) -> messages.ImportDirectionResponse:
        """Store a file that ExportDirection wrote, on this server or another."""
        header, data = await _received(request_iterator)
        name = direction_id(header.name, "header.name") if header.name else secrets.token_hex(8)
        try:
            if header.display_name:
                data = files.renamed(data, header.display_name)
            imported = files.decode(name, data).direction
        except StoreCorrupt as error:
            raise FieldInvalid(FieldViolation("chunk", error.message)) from error
        self._check_file(imported)
        directions = self._server.stores.directions
        async with self._accepting:
            await directions.check_room(len(await self._unfinished()) + 1, len(data))
            entry = await directions.create_from_file(name, data)
        return messages.ImportDirectionResponse(direction=direction(entry))

    def _check_file(self, direction: Direction) -> None:
        """Raises FieldInvalid for a direction beyond this server's limits, which could not be used here."""
        settings, options, fields = self._server.settings, direction.options, Fields()
        if options.num_inference_steps > settings.max_steps:
            fields.report(
                "chunk",
                f"the file has {options.num_inference_steps} steps, more than the limit of {settings.max_steps}",
            )
        prompts = options.source_prompt, options.target_prompt, options.negative_prompt
        if max(map(len, prompts)) > settings.max_prompt_chars:
            fields.report(
                "chunk", f"the file has a prompt of more than {settings.max_prompt_chars} characters, the limit"
            )
        fields.check()

    # --- learning -------------------------------------------------------------------------------------------------

    async def _again(self, draft: LearnDraft, digest: str) -> operations_pb2.Operation | None:
        """The operation of a repeated request id, whichever server of the store got it first; None for a new id."""
        task = await self._server.stores.operations.task(draft.operation)
        if task is None:
            return None
        if task.fingerprint != digest:
            raise RequestIdReused(f"request_id {task.request_id} was used before with another payload; use a new id")
        self._server.metrics.on_replay(result="replayed")
        return await current_operation(self._server, draft.operation)

    async def _start(
        self, request: messages.LearnDirectionRequest, draft: LearnDraft, digest: str
    ) -> operations_pb2.Operation:
        rows = self._check_rows(draft)
        photos = [await self._picture(image, draft) for image in draft.examples if not isinstance(image, Generated)]
        task = Task(
            model=draft.model.id,
            model_digest=draft.model.digest,
            direction=draft.direction,
            display_name=draft.display_name,
            options=draft.options,
            examples=tuple(example if isinstance(example, Generated) else None for example in draft.examples),
            request_id=request.request_id,
            fingerprint=digest,
            rows=rows,
        )
        async with self._accepting:  # two concurrent calls must not both pass the check
            known = await self._again(draft, digest)
            if known is not None:
                return known
            await self._check_admission(draft, rows)
            if not await self._server.stores.operations.create(draft.operation, task, photos):
                known = await self._again(draft, digest)  # another server created it for the same request
                assert known is not None
                return known
        self._server.manager.wake()
        return await current_operation(self._server, draft.operation)

    async def _picture(self, image: types_pb2.Image, draft: LearnDraft) -> Picture:
        pixels, _ = await Fetcher(self._server).picture(image, draft.model)
        return pixels

    def _check_rows(self, draft: LearnDraft) -> int:
        """Network rows of what is asked for; raises FieldInvalid if they are too many."""
        settings, steps = self._server.settings, draft.options.num_inference_steps
        rows = len(draft.examples) * learning_rows(draft.options, settings.learn_checkpoint_every)
        if rows > settings.max_learning_rows:
            too_many = (
                f"{len(draft.examples)} examples with {steps} steps take {rows} network rows, more than the limit of"
                f" {settings.max_learning_rows}: ask for less here, or in the other fields"
            )
            method = "optimization_steps" if isinstance(draft.options.method, Descent) else "candidates"
            raise FieldInvalid(*(FieldViolation(path, too_many) for path in ("examples", "direction.steps", method)))
        return rows

    async def _check_admission(self, draft: LearnDraft, rows: int) -> None:
        """Raises DirectionExists, OperationsFull, DirectionsFull."""
        unfinished = await self._unfinished()
        if draft.is_named and await self._is_taken(draft.direction, unfinished):
            name = direction_name(draft.direction)
            raise DirectionExists(
                f"{name} exists already, or is being learned; choose another direction_id",
                metadata={"resource_type": "underpaint.v1.Direction", "resource_name": name},
            )
        await self._server.stores.directions.check_room(len(unfinished) + 1)
        limit = self._server.settings.max_operations
        if len(unfinished) >= limit:
            raise OperationsFull(
                f"{len(unfinished)} operations are unfinished and the limit is {limit}; cancel some, or retry later",
                retry_after_s=_FULL_RETRY_S,
            )
        waiting = await self._server.stores.operations.rows(unfinished)
        limit = self._server.settings.max_operations_rows
        if waiting and waiting + rows > limit:
            raise OperationsFull(
                f"unfinished operations have {waiting} network rows, and {rows} more would exceed the limit of {limit};"
                " cancel some, or retry later",
                retry_after_s=_FULL_RETRY_S,
            )

    async def _unfinished(self) -> list[OperationSummary]:
        """The operations that have not ended; each will store a direction."""
        summaries = await self._server.stores.operations.scan()
        return [summary for summary in summaries.values() if summary.done_at is None]

    async def _is_taken(self, name: str, unfinished: list[OperationSummary]) -> bool:
        if await self._server.stores.directions.exists(name):
            return True
        tasks = [await self._server.stores.operations.task(summary.name) for summary in unfinished]
        return any(task is not None and task.direction == name for task in tasks)


async def _received(parts: AsyncIterator[messages.ImportDirectionRequest]) -> tuple[messages.Direction, bytes]:
    """The header and the bytes of an imported file, its CRC-32C verified; raises FieldInvalid."""
    header, data, crc32c = None, bytearray(), None
    async for part in parts:
        if header is None:
            header = _header(part)
        elif part.WhichOneof("part") != "chunk":
            raise FieldInvalid(FieldViolation("header", "only the first message may be the header"))
        data += part.chunk
        if len(data) > files.MAX_BYTES:
            raise FieldInvalid(FieldViolation("chunk", f"the file is larger than the limit of {files.MAX_BYTES} bytes"))
        crc32c = part.crc32c if part.HasField("crc32c") else None
    if header is None:
        raise FieldInvalid(FieldViolation("header", "missing: the first message must be the header"))
    actual = google_crc32c.value(bytes(data))
    if crc32c is not None and crc32c != actual:
        raise FieldInvalid(
            FieldViolation("crc32c", f"is {crc32c:08x}, but the received file has {actual:08x}: send the file again")
        )
    return header, bytes(data)


def _header(part: messages.ImportDirectionRequest) -> messages.Direction:
    fields = Fields()
    if part.WhichOneof("part") != "header":
        fields.report("header", "missing: the first message must be the header")
    for field, _ in part.header.ListFields():
        if field.name not in ("name", "display_name"):
            fields.report(f"header.{field.name}", "must be empty: the value is in the file")
    fields.text("header.display_name", part.header.display_name, MAX_DISPLAY_CHARS)
    fields.check()
    return part.header
