"""The bodies of the calls that compute: from a request through the engine to an answer.

Each function is the work of one :class:`SharedCall`: several calls may wait for it, and it is cancelled when the last
of them leaves. A job is submitted to the engine only after the whole request was found valid.
"""

import asyncio
from dataclasses import asdict, replace
from typing import Any

from underpaint.v1 import edit_service_pb2, inversion_service_pb2
from underpaint.v1.direction_service_pb2 import LearnDirectionRequest
from underpaint.v1.inversion_service_pb2 import InvertRequest

from underpaint_server.dispatch.job_handle import JobHandle
from underpaint_server.errors import FieldInvalid, FieldViolation
from underpaint_server.jobs import (
    Companion,
    Edited,
    EditJob,
    Inverted,
    InvertJob,
    Masked,
    MaskJob,
    Photo,
    Result,
    Usage,
)
from underpaint_server.methods import METHODS
from underpaint_server.methods.message import Completing, message_of
from underpaint_server.rpc import responses
from underpaint_server.rpc.calls import idempotency
from underpaint_server.rpc.calls.singleflight import SharedCall
from underpaint_server.rpc.context import ServerContext
from underpaint_server.rpc.handlers.source import Fetcher, fetch_source, find_inversion, keep_inversion
from underpaint_server.rpc.requests.edit import edit_draft
from underpaint_server.rpc.requests.invert import invert_draft
from underpaint_server.stores import Entry, inversion_digest
from underpaint_server.wire.drafts import EditDraft, EditSource, InvertDraft
from underpaint_server.wire.fitting import Fitting


async def fingerprint(
    server: ServerContext, kind: str, request: edit_service_pb2.EditRequest | InvertRequest | LearnDirectionRequest
) -> bytes:
    """A digest of the request that distinguishes a repeat from a reused id; empty without an id. Raises QueueFull."""
    if not request.request_id:
        return b""
    with server.threads.slot():
        return await server.threads.run(idempotency.fingerprint, kind, request)


async def edit(
    server: ServerContext,
    request: edit_service_pb2.EditRequest,
    call: SharedCall[Any],
    *,
    preview_every: int = 0,
) -> edit_service_pb2.EditResponse:
    """The answer to Edit and StreamEdit."""
    draft = await _draft(server, request)
    source, options = await fetch_source(server, draft), draft.method
    complete = message_of(options.name).complete
    if complete is not None:
        options, companion = await complete(options, Completing(request, draft.model, source, Fetcher(server)))
        source = replace(source, companion=companion)
    companion = source.companion
    job = EditJob(
        model=draft.model.id,
        source=source.source,
        inversion=source.inversion,
        method=options,
        target_prompt=draft.target_prompt,
        negative_prompt=draft.negative_prompt,
        guidance_scale=_guidance(draft, source),
        seed=draft.seed,
        companion=None if companion is None else Companion(companion.source, companion.inversion),
    )
    handle = server.engine.submit(
        job, priority=draft.priority, deadline_s=call.deadline.left_s, preview_every=preview_every
    )
    result = await _result(handle, call)
    assert isinstance(result, Edited)
    source = await _kept(server, source, result)
    return await server.threads.run(responses.edited, job, source, result, draft.media_type, draft.priority)


async def compute_mask(
    server: ServerContext, request: edit_service_pb2.EditRequest, call: SharedCall[Any]
) -> edit_service_pb2.ComputeMaskResponse:
    """The answer to ComputeMask."""
    draft = await _draft(server, request)
    if METHODS[draft.method.name].mask_cost is None:
        names = ", ".join(name for name, method in METHODS.items() if method.mask_cost is not None)
        raise FieldInvalid(FieldViolation("method", f"{draft.method.name} computes no mask; choose {names}"))
    check_mask = message_of(draft.method.name).check_mask
    if check_mask is not None:
        check_mask(request)
    source = await fetch_source(server, draft, use_store=False)
    assert source.inversion is not None
    job = MaskJob(
        model=draft.model.id,
        source=source.source,
        inversion=source.inversion,
        method=draft.method,
        target_prompt=draft.target_prompt,
        negative_prompt=draft.negative_prompt,
        guidance_scale=_guidance(draft, source),
        seed=draft.seed,
    )
    handle = server.engine.submit(job, priority=draft.priority, deadline_s=call.deadline.left_s)
    result = await _result(handle, call)
    assert isinstance(result, Masked)
    return await server.threads.run(responses.masked, job, source, result, draft.media_type, draft.priority)


async def invert(
    server: ServerContext, request: InvertRequest, call: SharedCall[Any]
) -> inversion_service_pb2.InvertResponse:
    """The answer to Invert and StreamInvert; waits for the same inversion if it is being computed already."""
    draft = invert_draft(request, server.model(request.model), server.settings)
    pixels, fitting = await Fetcher(server).picture(draft.image, draft.model)
    name = await server.threads.run(inversion_digest, draft.model, pixels, draft.options)
    stored = await find_inversion(server, name)
    if stored is not None and (not draft.verify or stored[0].reconstruction_max_abs_error is not None):
        return _inverted(name, Inverted(stored[0], Usage(), stored[0].notices), stored[1], fitting, hit=True)
    inversion = None if stored is None else stored[0]
    job = InvertJob(draft.model.id, Photo(pixels), draft.options, draft.verify, inversion)

    async def run(inner: SharedCall[Any]) -> tuple[Inverted, Entry]:
        return await _compute_inversion(server, name, job, fitting, draft, inner)

    with server.inverting.join((name, draft.verify), run, call.deadline) as inner:
        handle = await inner.admitted()
        if handle is not None:
            call.admit(handle)
        result, entry = await inner.result()
        return _inverted(name, result, entry, fitting, hit=inversion is not None)


async def _draft(server: ServerContext, request: edit_service_pb2.EditRequest) -> EditDraft:
    model, name = server.model(request.model), request.WhichOneof("method")
    lookup = message_of(name).lookup if name else None
    looked_up = await lookup(request, Fetcher(server)) if lookup is not None else None
    return edit_draft(request, model, server.settings, looked_up)


async def _compute_inversion(
    server: ServerContext, name: str, job: InvertJob, fitting: Fitting, draft: InvertDraft, call: SharedCall[Any]
) -> tuple[Inverted, Entry]:
    handle = server.engine.submit(job, priority=draft.priority, deadline_s=call.deadline.left_s)
    result = await _result(handle, call)
    assert isinstance(result, Inverted)
    return result, await server.stores.inversions.put(name, result.inversion, asdict(fitting), replace=job.verify)


def _inverted(
    name: str, result: Inverted, entry: Entry, fitting: Fitting, *, hit: bool
) -> inversion_service_pb2.InvertResponse:
    return inversion_service_pb2.InvertResponse(
        inversion=responses.inversion(name, entry, fitting),
        usage=responses.usage(result.usage, hit),
        notices=responses.notices(result.notices),
    )


async def _kept(server: ServerContext, source: EditSource, result: Edited) -> EditSource:
    """Store the inversions that the edit made; returns the source with the names of those that could be stored."""
    made, companion = result.inversion, source.companion
    if made is not None and not await keep_inversion(server, source.name, made, source.fitting):
        source = replace(source, name="")
    made = result.companion
    if (
        companion is not None
        and made is not None
        and not await keep_inversion(server, companion.name, made, companion.fitting)
    ):
        source = replace(source, companion=replace(companion, name=""))
    return source


def _guidance(draft: EditDraft, source: EditSource) -> float:
    if draft.guidance_scale is not None:
        return draft.guidance_scale
    assert source.inversion is not None  # None means the inversion's, and then the method has one
    return source.inversion.guidance_scale


async def _result(handle: JobHandle, call: SharedCall[Any]) -> Result:
    call.admit(handle)
    try:
        return await handle.result()
    except asyncio.CancelledError:
        handle.cancel()
        raise
