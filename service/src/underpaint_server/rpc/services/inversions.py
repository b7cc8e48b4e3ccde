"""The InversionService."""

# ruff: noqa: N802, ARG002 (methods and their arguments are the contract's)

from collections.abc import AsyncIterator
from typing import Any

from underpaint.v1 import inversion_service_pb2 as messages
from underpaint.v1 import inversion_service_pb2_grpc

from underpaint_server.errors import InversionExpired
from underpaint_server.jobs import Progress
from underpaint_server.rpc import handlers, responses
from underpaint_server.rpc.calls.messages import Context
from underpaint_server.rpc.calls.singleflight import Deadline, SharedCall
from underpaint_server.rpc.context import ServerContext
from underpaint_server.wire.fields import at, page_size
from underpaint_server.wire.names import inversion_id


class InversionService(inversion_service_pb2_grpc.InversionServiceServicer):
    """Inverts images and stores their latents. Methods raise errors of :mod:`underpaint_server.errors`."""

    def __init__(self, server: ServerContext) -> None:
        self._server = server

    async def Invert(self, request: messages.InvertRequest, context: Context) -> messages.InvertResponse:
        """Invert, and return the stored inversion."""
        with await self._invert(request, context) as call:
            answer: messages.InvertResponse = await call.result()
        context.set_trailing_metadata((("server-timing", responses.server_timing(answer.usage)),))
        return answer

    async def StreamInvert(
        self, request: messages.StreamInvertRequest, context: Context
    ) -> AsyncIterator[messages.StreamInvertResponse]:
        """Invert, and stream progress, then the result."""
        with at("invert"), await self._invert(request.invert, context) as call:
            handle = await call.admitted()
            if handle is not None and not call.done:
                async for event in handle.events():
                    if isinstance(event, Progress):
                        yield messages.StreamInvertResponse(progress=responses.progress(event))
            answer: messages.InvertResponse = await call.result()
        context.set_trailing_metadata((("server-timing", responses.server_timing(answer.usage)),))
        yield messages.StreamInvertResponse(result=answer)

    async def GetInversion(
        self, request: messages.GetInversionRequest, context: Context
    ) -> messages.GetInversionResponse:
        """Return one inversion without its latents."""
        name = inversion_id(request.name, "name")
        return messages.GetInversionResponse(
            inversion=responses.inversion(name, await self._server.stores.inversions.head(name))
        )

    async def ListInversions(
        self, request: messages.ListInversionsRequest, context: Context
    ) -> messages.ListInversionsResponse:
        """Return one page of inversions, newest first."""
        size = page_size(request.page_size)
        entries, token = await self._server.stores.inversions.list(size, request.page_token)
        return messages.ListInversionsResponse(
            inversions=[responses.inversion(entry.name, entry) for entry in entries], next_page_token=token
        )

    async def DeleteInversion(
        self, request: messages.DeleteInversionRequest, context: Context
    ) -> messages.DeleteInversionResponse:
        """Delete one inversion."""
        name = inversion_id(request.name, "name")
        if not await self._server.stores.inversions.delete(name) and not request.allow_missing:
            raise InversionExpired(
                f"{request.name} does not exist",
                metadata={"resource_type": "underpaint.v1.Inversion", "resource_name": request.name},
            )
        return messages.DeleteInversionResponse()

    async def ExportInversion(
        self, request: messages.ExportInversionRequest, context: Context
    ) -> AsyncIterator[messages.ExportInversionResponse]:
        """Stream the safetensors file in chunks."""
        data = await self._server.stores.inversions.export(inversion_id(request.name, "name"))
        for chunk in responses.file_chunks(messages.ExportInversionResponse, data):
            yield chunk

    async def _invert(self, request: messages.InvertRequest, context: Context) -> SharedCall[messages.InvertResponse]:
        deadline = Deadline.after(context.time_remaining())

        async def run(call: SharedCall[Any]) -> messages.InvertResponse:
            return await handlers.invert(self._server, request, call)

        digest = await handlers.fingerprint(self._server, "invert", request)
        return self._server.idempotency.join(request.request_id, digest, messages.InvertResponse, run, deadline)
