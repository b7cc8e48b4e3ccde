"""EditService."""

# ruff: noqa: N802, ARG002 (methods and their arguments are the contract's)

from collections.abc import AsyncIterator
from typing import Any, Final

from underpaint.v1 import edit_service_pb2 as messages
from underpaint.v1 import edit_service_pb2_grpc

from underpaint_server.errors import MethodDisabled
from underpaint_server.jobs import Preview
from underpaint_server.rpc import answers, snapshots, work
from underpaint_server.rpc.calls import REQUEST_ID
from underpaint_server.rpc.fields import Fields, at
from underpaint_server.rpc.flights import Deadline, Flight
from underpaint_server.rpc.front import Front
from underpaint_server.rpc.interceptors import Context

_PREVIEW_PX: Final = 256
_MAX_PREVIEW_PX: Final = 1024


class EditService(edit_service_pb2_grpc.EditServiceServicer):
    """Edits real images; errors are those of :mod:`underpaint_server.errors`."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def Edit(self, request: messages.EditRequest, context: Context) -> messages.EditResponse:
        """Edit and answer once."""
        with await self._edit(request, context) as flight:
            answer: messages.EditResponse = await flight.result()
        context.set_trailing_metadata((("server-timing", answers.server_timing(answer.usage)),))
        return answer

    async def StreamEdit(
        self, request: messages.StreamEditRequest, context: Context
    ) -> AsyncIterator[messages.StreamEditResponse]:
        """Edit and report: accepted, then progress and previews, then the result."""
        longest_px = _check_stream(request)
        with at("edit"), await self._edit(request.edit, context, request.preview_every) as flight:
            handle = await flight.admitted()
            yield messages.StreamEditResponse(
                accepted=messages.Accepted(
                    request_id=REQUEST_ID.get(), queue_position=handle.queue_position if handle else 0
                )
            )
            if handle is not None and not flight.done:
                async for event in handle.events():
                    # A running request that this call has joined may send previews to another.
                    if request.preview_every or not isinstance(event, Preview):
                        yield await self._event(event, longest_px)
            answer: messages.EditResponse = await flight.result()
        context.set_trailing_metadata((("server-timing", answers.server_timing(answer.usage)),))
        yield messages.StreamEditResponse(result=answer)

    async def SubmitEdit(self, request: messages.SubmitEditRequest, context: Context) -> messages.SubmitEditResponse:
        """Not offered."""
        raise MethodDisabled("edits are no operations here; use StreamEdit, or Edit with a request_id")

    async def ComputeMask(self, request: messages.ComputeMaskRequest, context: Context) -> messages.ComputeMaskResponse:
        """Only DiffEdit's mask."""

        async def run(flight: Flight[Any]) -> messages.ComputeMaskResponse:
            return await work.compute_mask(self._front, request.edit, flight)

        with at("edit"), await self._board("mask", request.edit, run, context) as flight:
            answer: messages.ComputeMaskResponse = await flight.result()
        context.set_trailing_metadata((("server-timing", answers.server_timing(answer.usage)),))
        return answer

    async def _edit(
        self, request: messages.EditRequest, context: Context, preview_every: int = 0
    ) -> Flight[messages.EditResponse]:

        async def run(flight: Flight[Any]) -> messages.EditResponse:
            return await work.edit(self._front, request, flight, preview_every=preview_every)

        return await self._board("edit", request, run, context)

    async def _board(self, kind: str, request: messages.EditRequest, run: Any, context: Context) -> Flight[Any]:
        deadline = Deadline.after(context.time_remaining())
        digest = await work.fingerprint(self._front, kind, request)
        return self._front.replay.board(request.request_id, digest, run, deadline)

    async def _event(self, event: Any, longest_px: int) -> messages.StreamEditResponse:
        if isinstance(event, Preview):
            preview = await self._front.pool.run(answers.preview, event, longest_px)
            return messages.StreamEditResponse(preview=preview)
        return messages.StreamEditResponse(progress=snapshots.progress(event))


def _check_stream(request: messages.StreamEditRequest) -> int:
    fields = Fields()
    if request.preview_every < 0:
        fields.wrong("preview_every", f"{request.preview_every} is negative")
    longest_px = fields.count("preview_size", request.preview_size, _PREVIEW_PX, _MAX_PREVIEW_PX)
    fields.check()
    return longest_px
