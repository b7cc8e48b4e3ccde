"""What the RPCs that compute have in common: from a request through the engine to an answer.

Each function here is the body of one :class:`Flight`: it may be waited for by several calls, and is cancelled when the
last of them leaves. Nothing is submitted before everything about the request was found right.
"""

import asyncio
from dataclasses import asdict, replace
from typing import Any

from underpaint.v1 import edit_service_pb2, inversion_service_pb2
from underpaint.v1.direction_service_pb2 import LearnDirectionRequest
from underpaint.v1.inversion_service_pb2 import InvertRequest

from underpaint_server.engine.ticket import JobHandle
from underpaint_server.errors import FieldInvalid, FieldViolation
from underpaint_server.jobs import (
    Content,
    DiffEdit,
    Direction,
    Edited,
    EditJob,
    EditMethod,
    Inverted,
    InvertJob,
    Masked,
    MaskJob,
    Photo,
    Result,
    Stored,
    Usage,
)
from underpaint_server.rpc import answers, contents, convert, replay, sources
from underpaint_server.rpc.drafts import EditDraft, InvertDraft, Start
from underpaint_server.rpc.fitting import Fitting
from underpaint_server.rpc.flights import Flight
from underpaint_server.rpc.front import Front
from underpaint_server.rpc.methods import method_of, name_of
from underpaint_server.rpc.names import direction_id, inversion_digest
from underpaint_server.stores.inversions import Entry


async def fingerprint(
    front: Front, kind: str, request: edit_service_pb2.EditRequest | InvertRequest | LearnDirectionRequest
) -> bytes:
    """What tells a repeat of a request id from its abuse; empty without an id. Raises QueueFull."""
    if not request.request_id:
        return b""
    with front.pool.place():
        return await front.pool.run(replay.fingerprint, kind, request)


async def edit(
    front: Front,
    request: edit_service_pb2.EditRequest,
    flight: Flight[Any],
    *,
    preview_every: int = 0,
) -> edit_service_pb2.EditResponse:
    """The answer to Edit and StreamEdit."""
    model, direction = front.model(request.model), await _direction(front, request)
    draft = convert.edit_draft(request, model, front.settings, direction)
    start = await contents.with_content(front, draft, await sources.start_of(front, draft))
    job = EditJob(
        model=draft.model.id,
        source=start.source,
        inversion=start.inversion,
        method=await _completed(front, draft, start),
        target_prompt=draft.target_prompt,
        negative_prompt=draft.negative_prompt,
        guidance_scale=_guidance(draft, start),
        seed=draft.seed,
        content=None if start.content is None else Content(start.content.source, start.content.inversion),
    )
    handle = front.engine.submit(
        job, priority=draft.priority, deadline_s=flight.deadline.left_s, preview_every=preview_every
    )
    result = await _result(handle, flight)
    assert isinstance(result, Edited)
    start = await _kept(front, start, result)
    return await front.pool.run(answers.edited, job, start, result, draft.media_type, draft.priority)


async def compute_mask(
    front: Front, request: edit_service_pb2.EditRequest, flight: Flight[Any]
) -> edit_service_pb2.ComputeMaskResponse:
    """The answer to ComputeMask."""
    model, direction = front.model(request.model), await _direction(front, request)
    draft = convert.edit_draft(request, model, front.settings, direction)
    if not isinstance(draft.method, DiffEdit):
        raise FieldInvalid(FieldViolation("method", "only diffedit has a mask"))
    if draft.mask is not None:
        raise FieldInvalid(FieldViolation("diffedit.mask", "given, so there is nothing to compute"))
    start = await sources.start_of(front, draft, use_store=False)
    assert start.inversion is not None
    job = MaskJob(
        model=draft.model.id,
        source=start.source,
        inversion=start.inversion,
        method=draft.method,
        target_prompt=draft.target_prompt,
        negative_prompt=draft.negative_prompt,
        guidance_scale=_guidance(draft, start),
        seed=draft.seed,
    )
    handle = front.engine.submit(job, priority=draft.priority, deadline_s=flight.deadline.left_s)
    result = await _result(handle, flight)
    assert isinstance(result, Masked)
    return await front.pool.run(answers.masked, job, start, result, draft.media_type, draft.priority)


async def invert(front: Front, request: InvertRequest, flight: Flight[Any]) -> inversion_service_pb2.InvertResponse:
    """The answer to Invert and StreamInvert; the same inversion being made already is waited for."""
    draft = convert.invert_draft(request, front.model(request.model), front.settings)
    pixels, fitting = await sources.read_picture(front, draft.image, draft.model)
    name = await front.pool.run(inversion_digest, draft.model, pixels, draft.options)
    found = await sources.stored(front, name)
    if found is not None and (not draft.verify or found[0].reconstruction_max_abs_error is not None):
        return _inverted(name, Inverted(found[0], Usage()), found[1], fitting, hit=True)
    inversion = None if found is None else found[0]
    job = InvertJob(draft.model.id, Photo(pixels), draft.options, draft.verify, inversion)

    async def run(inner: Flight[Any]) -> tuple[Inverted, Entry]:
        return await _make(front, name, job, fitting, draft, inner)

    with front.inverting.board((name, draft.verify), run, flight.deadline) as inner:
        handle = await inner.admitted()
        if handle is not None:
            flight.admit(handle)
        result, entry = await inner.result()
        return _inverted(name, result, entry, fitting, hit=inversion is not None)


async def _make(
    front: Front,
    name: str,
    job: InvertJob,
    fitting: Fitting,
    draft: InvertDraft,
    flight: Flight[Any],
) -> tuple[Inverted, Entry]:
    handle = front.engine.submit(job, priority=draft.priority, deadline_s=flight.deadline.left_s)
    result = await _result(handle, flight)
    assert isinstance(result, Inverted)
    return result, await front.store.put(name, result.inversion, asdict(fitting), replace=job.verify)


def _inverted(
    name: str, result: Inverted, entry: Entry, fitting: Fitting, *, hit: bool
) -> inversion_service_pb2.InvertResponse:
    return inversion_service_pb2.InvertResponse(
        inversion=answers.inversion(name, entry, fitting),
        usage=answers.usage(result.usage, hit),
        notices=answers.notices(result.notices),
    )


async def _kept(front: Front, start: Start, result: Edited) -> Start:
    """The start with the names of those inversions that are in the store."""
    if result.inversion is not None and not await sources.keep(front, start.name, result.inversion, start.fitting):
        start = replace(start, name="")
    content = start.content
    if (
        content is not None
        and result.content is not None
        and not await sources.keep(front, content.name, result.content, content.fitting)
    ):
        start = replace(start, content=replace(content, name=""))
    return start


async def _direction(front: Front, request: edit_service_pb2.EditRequest) -> Direction | None:
    """The direction that an edit names; raises FieldInvalid, DirectionNotFound, StoreCorrupt."""
    if request.disentangled.WhichOneof("weights") != "direction":
        return None
    name = direction_id(request.disentangled.direction, "disentangled.direction")
    return (await front.directions.get(name)).direction


async def _completed(front: Front, draft: EditDraft, start: Start) -> EditMethod:
    """The method with what only the source tells."""
    method, options = method_of(draft.method), draft.method
    if draft.mask is not None:
        path = f"{name_of(options)}.{method.mask}"
        options = method.with_mask(options, await sources.read_mask(front, draft.mask, start.fitting, path))
    if method.after is not None and isinstance(start.source, Stored):
        options = method.after(options, start.source.inversion.options)
    return options


def _guidance(draft: EditDraft, start: Start) -> float:
    if draft.guidance_scale is not None:
        return draft.guidance_scale
    assert start.inversion is not None  # None stands for the inversion's only where the method has one
    return start.inversion.guidance_scale


async def _result(handle: JobHandle, flight: Flight[Any]) -> Result:
    flight.admit(handle)
    try:
        return await handle.result()
    except asyncio.CancelledError:
        handle.cancel()
        raise
