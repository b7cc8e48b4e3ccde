"""DirectionService."""

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
from underpaint_server.jobs import Direction, Generated, Picture
from underpaint_server.rpc import handlers
from underpaint_server.rpc.calls.interceptor import Context
from underpaint_server.rpc.context import ServerContext
from underpaint_server.rpc.handlers.operation import current_operation
from underpaint_server.rpc.handlers.source import Fetcher
from underpaint_server.rpc.requests.learn import MAX_DISPLAY_CHARS, LearnDraft, learn_draft
from underpaint_server.rpc.responses.direction import direction
from underpaint_server.stores import directions as files
from underpaint_server.stores.operations import OperationSummary, Task
from underpaint_server.wire.fields import Fields, page_size
from underpaint_server.wire.names import direction_id, direction_name

_CHUNK_BYTES: Final = 1024 * 1024
_FULL_RETRY_S: Final = 30.0


class DirectionService(direction_service_pb2_grpc.DirectionServiceServicer):
    """Learns directions and keeps them; errors are those of :mod:`underpaint_server.errors`."""

    def __init__(self, server: ServerContext) -> None:
        self._server = server
        self._accepting = asyncio.Lock()

    async def LearnDirection(
        self, request: messages.LearnDirectionRequest, context: Context
    ) -> messages.LearnDirectionResponse:
        """Store what to learn, and answer; it is learned afterwards."""
        if self._server.draining:
            raise Draining("this server is about to stop; another one takes the call", retry_after_s=1.0)
        model = self._server.model(request.direction.model, "direction.model")
        draft = learn_draft(request, model, self._server.settings)
        digest = (await handlers.fingerprint(self._server, "learn", request)).hex()
        known = await self._again(draft, digest)
        return messages.LearnDirectionResponse(operation=known or await self._start(request, draft, digest))

    async def GetDirection(
        self, request: messages.GetDirectionRequest, context: Context
    ) -> messages.GetDirectionResponse:
        """One direction."""
        entry = await self._server.stores.directions.get(direction_id(request.name, "name"))
        return messages.GetDirectionResponse(direction=direction(entry))

    async def ListDirections(
        self, request: messages.ListDirectionsRequest, context: Context
    ) -> messages.ListDirectionsResponse:
        """A page of directions, newest first."""
        entries, token = await self._server.stores.directions.list(page_size(request.page_size), request.page_token)
        return messages.ListDirectionsResponse(
            directions=[direction(entry) for entry in entries], next_page_token=token
        )

    async def DeleteDirection(
        self, request: messages.DeleteDirectionRequest, context: Context
    ) -> messages.DeleteDirectionResponse:
        """Delete one."""
        await self._server.stores.directions.delete(direction_id(request.name, "name"), request.etag)
        return messages.DeleteDirectionResponse()

    async def ExportDirection(
        self, request: messages.ExportDirectionRequest, context: Context
    ) -> AsyncIterator[messages.ExportDirectionResponse]:
        """The safetensors file: its size first, its CRC-32C last."""
        data = await self._server.stores.directions.export(direction_id(request.name, "name"))
        starts = range(0, len(data), _CHUNK_BYTES)
        for start in starts:
            yield messages.ExportDirectionResponse(
                total_bytes=len(data) if start == 0 else 0,
                chunk=data[start : start + _CHUNK_BYTES],
                crc32c=google_crc32c.value(data) if start == starts[-1] else 0,
            )

    async def ImportDirection(
        self, request_iterator: AsyncIterator[messages.ImportDirectionRequest], context: Context
    ) -> messages.ImportDirectionResponse:
        """Store a file that ExportDirection wrote, here or elsewhere."""
        header, data = await _received(request_iterator)
        name = direction_id(header.name, "header.name") if header.name else secrets.token_hex(8)
        try:
            if header.display_name:
                data = files.renamed(data, header.display_name)
            imported = files.decode(name, data).direction
        except StoreCorrupt as error:
            raise FieldInvalid(FieldViolation("chunk", error.message)) from error
        self._check_file(imported)
        entry = await self._server.stores.directions.create_from_file(name, data)
        return messages.ImportDirectionResponse(direction=direction(entry))

    def _check_file(self, direction: Direction) -> None:
        """Raises FieldInvalid for what could not have been learned here, and so not be used."""
        settings, options, fields = self._server.settings, direction.options, Fields()
        if options.num_inference_steps > settings.max_steps:
            fields.wrong("chunk", f"the file has {options.num_inference_steps} steps, more than {settings.max_steps}")
        if max(len(options.source_prompt), len(options.target_prompt)) > settings.max_prompt_chars:
            fields.wrong("chunk", f"the file has a prompt of more than {settings.max_prompt_chars} characters")
        fields.check()

    # --- learning -------------------------------------------------------------------------------------------------

    async def _again(self, draft: LearnDraft, digest: str) -> operations_pb2.Operation | None:
        """The operation that a repeated request id stands for, on whichever server of the store it came first."""
        task = await self._server.stores.operations.task(draft.operation)
        if task is None:
            return None
        if task.fingerprint != digest:
            raise RequestIdReused(f"request {task.request_id} came before with another payload; draw a new id")
        self._server.metrics.on_replay(result="replayed")
        return await current_operation(self._server, draft.operation)

    async def _start(
        self, request: messages.LearnDirectionRequest, draft: LearnDraft, digest: str
    ) -> operations_pb2.Operation:
        photos = [await self._picture(each, draft) for each in draft.examples if not isinstance(each, Generated)]
        task = Task(
            model=draft.model.id,
            model_digest=draft.model.digest,
            direction=draft.direction,
            display_name=draft.display_name,
            options=draft.options,
            examples=tuple(example if isinstance(example, Generated) else None for example in draft.examples),
            request_id=request.request_id,
            fingerprint=digest,
        )
        async with self._accepting:  # two calls at the same moment must not both find the place free
            known = await self._again(draft, digest)
            if known is not None:
                return known
            await self._check_place(draft)
            if not await self._server.stores.operations.create(draft.operation, task, photos):
                known = await self._again(draft, digest)  # the same request came by another server
                assert known is not None
                return known
        self._server.manager.wake()
        return await current_operation(self._server, draft.operation)

    async def _picture(self, image: types_pb2.Image, draft: LearnDraft) -> Picture:
        pixels, _ = await Fetcher(self._server).picture(image, draft.model)
        return pixels

    async def _check_place(self, draft: LearnDraft) -> None:
        """Raises DirectionExists, OperationsFull."""
        unfinished = [
            summary for summary in (await self._server.stores.operations.scan()).values() if summary.done_at is None
        ]
        if draft.is_named and await self._is_taken(draft.direction, unfinished):
            name = direction_name(draft.direction)
            raise DirectionExists(
                f"there is a {name} already, or one is being learned; choose another id",
                metadata={"resource_type": "underpaint.v1.Direction", "resource_name": name},
            )
        most = self._server.settings.max_operations
        if len(unfinished) >= most:
            raise OperationsFull(
                f"{len(unfinished)} operations are unfinished, of {most} at most; cancel some, or come back later",
                retry_after_s=_FULL_RETRY_S,
            )

    async def _is_taken(self, name: str, unfinished: list[OperationSummary]) -> bool:
        if await self._server.stores.directions.exists(name):
            return True
        tasks = [await self._server.stores.operations.task(summary.name) for summary in unfinished]
        return any(task is not None and task.direction == name for task in tasks)


async def _received(parts: AsyncIterator[messages.ImportDirectionRequest]) -> tuple[messages.Direction, bytes]:
    """The header and the file of an import, its checksum checked; raises FieldInvalid."""
    header, data, crc32c = None, bytearray(), None
    async for part in parts:
        if header is None:
            header = _header(part)
        elif part.WhichOneof("part") != "chunk":
            raise FieldInvalid(FieldViolation("header", "only the first message is the header"))
        data += part.chunk
        if len(data) > files.MAX_BYTES:
            raise FieldInvalid(FieldViolation("chunk", f"the file is larger than {files.MAX_BYTES} bytes"))
        crc32c = part.crc32c if part.HasField("crc32c") else None
    if header is None:
        raise FieldInvalid(FieldViolation("header", "not sent"))
    actual = google_crc32c.value(bytes(data))
    if crc32c is not None and crc32c != actual:
        raise FieldInvalid(FieldViolation("crc32c", f"{crc32c:08x} promised, {actual:08x} received: send it again"))
    return header, bytes(data)


def _header(part: messages.ImportDirectionRequest) -> messages.Direction:
    fields = Fields()
    if part.WhichOneof("part") != "header":
        fields.wrong("header", "not sent first")
    for field, _ in part.header.ListFields():
        if field.name not in ("name", "display_name"):
            fields.wrong(f"header.{field.name}", "unused: the file says it")
    fields.text("header.display_name", part.header.display_name, MAX_DISPLAY_CHARS)
    fields.check()
    return part.header
