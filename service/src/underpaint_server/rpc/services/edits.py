"""The EditService."""

# ruff: noqa: N802, ARG002 (methods and their arguments are the contract's)

from collections.abc import AsyncIterator
from typing import Any, Final

from google.protobuf.message import Message
from underpaint.v1 import edit_service_pb2 as messages
from underpaint.v1 import edit_service_pb2_grpc

from underpaint_server.errors import MethodDisabled
from underpaint_server.jobs import Preview
from underpaint_server.rpc import handlers, responses
from underpaint_server.rpc.calls.messages import Context
from underpaint_server.rpc.calls.record import REQUEST_ID
from underpaint_server.rpc.calls.singleflight import Deadline, SharedCall
from underpaint_server.rpc.context import ServerContext
from underpaint_server.wire.fields import Fields, at

_PREVIEW_PX: Final = 256
_MAX_PREVIEW_PX: Final = 1024


class EditService(edit_service_pb2_grpc.EditServiceServicer):
    """Edits real images. Methods raise errors of :mod:`underpaint_server.errors`."""

    def __init__(self, server: ServerContext) -> None:
        self._server = server

    async def Edit(self, request: messages.EditRequest, context: Context) -> messages.EditResponse:
        """Edit, and return the result."""
        with await self._edit(request, context) as call:
            answer: messages.EditResponse = await call.result()
        context.set_trailing_metadata((("server-timing", responses.server_timing(answer.usage)),))
        return answer

    async def StreamEdit(
        self, request: messages.StreamEditRequest, context: Context
    ) -> AsyncIterator[messages.StreamEditResponse]:
        """Edit, and stream one ``accepted``, then progress and previews, then the result."""
        longest_px = _check_stream(request)
        with at("edit"), await self._edit(request.edit, context, request.preview_every) as call:
            handle = await call.admitted()
            yield messages.StreamEditResponse(
                accepted=messages.Accepted(
                    request_id=REQUEST_ID.get(), queue_position=handle.queue_position if handle else 0
                )
            )
            if handle is not None and not call.done:
                async for event in handle.events():
                    # This call may have joined an edit that was started by a call with previews.
                    if request.preview_every or not isinstance(event, Preview):
                        yield await self._event(event, longest_px)
            answer: messages.EditResponse = await call.result()
        context.set_trailing_metadata((("server-timing", responses.server_timing(answer.usage)),))
        yield messages.StreamEditResponse(result=answer)

    async def SubmitEdit(self, request: messages.SubmitEditRequest, context: Context) -> messages.SubmitEditResponse:
        """Not supported: raises MethodDisabled."""
        raise MethodDisabled("this server does not run edits as operations; use StreamEdit, or Edit with a request_id")

    async def ComputeMask(self, request: messages.ComputeMaskRequest, context: Context) -> messages.ComputeMaskResponse:
        """Compute the mask of an edit without editing."""

        async def run(call: SharedCall[Any]) -> messages.ComputeMaskResponse:
            return await handlers.compute_mask(self._server, request.edit, call)

        with at("edit"), await self._join("mask", request.edit, messages.ComputeMaskResponse, run, context) as call:
            answer: messages.ComputeMaskResponse = await call.result()
        context.set_trailing_metadata((("server-timing", responses.server_timing(answer.usage)),))
        return answer

    async def _edit(
        self, request: messages.EditRequest, context: Context, preview_every: int = 0
    ) -> SharedCall[messages.EditResponse]:

        async def run(call: SharedCall[Any]) -> messages.EditResponse:
            return await handlers.edit(self._server, request, call, preview_every=preview_every)

        return await self._join("edit", request, messages.EditResponse, run, context)

    async def _join(
        self, kind: str, request: messages.EditRequest, answer: type[Message], run: Any, context: Context
    ) -> SharedCall[Any]:
        deadline = Deadline.after(context.time_remaining())
        digest = await handlers.fingerprint(self._server, kind, request)
        return self._server.idempotency.join(request.request_id, digest, answer, run, deadline)

    async def _event(self, event: Any, longest_px: int) -> messages.StreamEditResponse:
        if isinstance(event, Preview):
            preview = await self._server.threads.run(responses.preview, event, longest_px)
            return messages.StreamEditResponse(preview=preview)
        return messages.StreamEditResponse(progress=responses.progress(event))


def _check_stream(request: messages.StreamEditRequest) -> int:
    fields = Fields()
    if request.preview_every < 0:
        fields.report("preview_every", f"must not be negative, is {request.preview_every}")
    longest_px = fields.count("preview_size", request.preview_size, _PREVIEW_PX, _MAX_PREVIEW_PX)
    fields.check()
    return longest_px
