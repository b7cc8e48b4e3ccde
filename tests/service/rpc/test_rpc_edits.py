"""Edits over a socket: what the engine is asked, what the caller gets, and that an answer can be repeated."""

import asyncio
import io
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import grpc
import numpy as np
import pytest
from PIL import Image
from support.front import MINI, Wire, edit, encoded, photo, refused
from support.front import answer as computed
from support.waiting import PATIENCE_S, until
from underpaint.v1 import edit_service_pb2, inversion_service_pb2, types_pb2
from underpaint_server.jobs import (
    DdimConvention,
    Generated,
    InversionOptions,
    MaskJob,
    Notice,
    Phase,
    Photo,
    Preview,
    Priority,
    Progress,
    Stored,
)
from underpaint_server.methods.ddim.options import DdimEdit, DdimInversion
from underpaint_server.methods.diffedit.options import DiffEdit
from underpaint_server.methods.edict.options import EdictInversion
from underpaint_server.methods.sdedit.options import SdEdit


async def test_every_default_is_filled_in(wire: Wire) -> None:
    await wire.edits.Edit(edit("edict"))
    await wire.edits.Edit(edit("ddim"))
    await wire.edits.Edit(edit("diffedit"))
    await wire.edits.Edit(edit("sdedit"))
    edict, ddim, diffedit, sdedit = wire.engine.jobs
    assert edict.inversion == InversionOptions(EdictInversion(0.93), 20, 0.8, 3.0, "")
    assert edict.guidance_scale == 3.0
    assert ddim.inversion == InversionOptions(DdimInversion(DdimConvention.TARGET), 20, 0.8, 1.0, "")
    assert ddim.guidance_scale == 3.0
    assert isinstance(diffedit.source, Stored), "DDIM and DiffEdit start from the same inversion"
    assert diffedit.method == DiffEdit(None, 0.5, 10, 0.5, "")
    assert diffedit.guidance_scale == 5.0
    assert sdedit.inversion is None
    assert (sdedit.method, sdedit.guidance_scale) == (SdEdit(0.8, 20), 3.0)
    assert [handle.priority for handle in wire.engine.handles] == [Priority.NORMAL] * 4


async def test_numbers_are_what_the_caller_wrote_before_float32(wire: Wire) -> None:
    parameters = inversion_service_pb2.InversionParameters(strength=0.7, guidance_scale=2.3)
    parameters.edict.mixing_coefficient = 0.95
    await wire.edits.Edit(edit("edict", inversion_parameters=parameters, guidance_scale=4.1))
    job = wire.engine.jobs[0]
    assert (job.inversion.strength, job.inversion.guidance_scale, job.guidance_scale) == (0.7, 2.3, 4.1)
    assert job.inversion.method.mixing_coefficient == 0.95


async def test_edict_guides_as_its_inversion_did(wire: Wire) -> None:
    parameters = inversion_service_pb2.InversionParameters(guidance_scale=1.5)
    first = await wire.edits.Edit(edit("edict", inversion_parameters=parameters))
    await wire.edits.Edit(edit("edict", inversion=first.inversion))
    assert [job.guidance_scale for job in wire.engine.jobs] == [1.5, 1.5]


@pytest.mark.parametrize("method", ["edict", "ddim", "diffedit", "sdedit"])
@pytest.mark.parametrize("source", ["image", "inversion", "generated"])
async def test_the_resolved_request_gives_the_same_bytes(wire: Wire, method: str, source: str) -> None:
    request = edit(method, **await _source(wire, method, source), negative_prompt="fog")
    first = await wire.edits.Edit(request)
    again = await wire.edits.Edit(first.resolved)
    assert again.image.content == first.image.content
    assert again.resolved == first.resolved
    assert first.resolved.request_id == ""
    assert first.resolved.HasField("seed")
    assert first.inversion == (
        "" if source == "generated" or (method, source) == ("sdedit", "image") else again.inversion
    )


async def _source(wire: Wire, method: str, source: str) -> dict[str, Any]:
    if source == "image":
        return {"image": photo((200, 100))}
    if source == "generated":
        return {"generated": edit_service_pb2.GeneratedSource(prompt="a cat", width=96, height=48)}
    made = await wire.edits.Edit(edit("edict" if method == "edict" else "ddim", image=photo((99, 130))))
    return {"inversion": made.inversion}


@pytest.mark.parametrize("method", ["edict", "ddim", "diffedit"])
async def test_a_resolved_edit_of_an_image_names_its_inversion_and_says_how_it_was_made(
    wire: Wire, method: str
) -> None:
    parameters = inversion_service_pb2.InversionParameters(steps=9, strength=0.7, source_prompt="a cat")
    first = await wire.edits.Edit(edit(method, inversion_parameters=parameters))
    resolved = first.resolved
    assert (resolved.WhichOneof("source"), resolved.inversion) == ("inversion", first.inversion)
    name = inversion_service_pb2.GetInversionRequest(name=first.inversion)
    stored = await wire.inversions.GetInversion(name)
    stored = stored.inversion
    assert resolved.inversion_parameters == stored.parameters
    assert stored.parameters.steps == 9
    assert (await wire.edits.Edit(resolved)).resolved == resolved


@pytest.mark.parametrize("method", ["edict", "ddim", "diffedit"])
async def test_a_resolved_edit_is_repeated_from_its_image_when_the_inversion_is_gone(wire: Wire, method: str) -> None:
    image = photo((300, 100))
    image.fit = types_pb2.FIT_RESIZE
    parameters = inversion_service_pb2.InversionParameters(steps=9, strength=0.7, source_prompt="a cat")
    first = await wire.edits.Edit(edit(method, image=image, inversion_parameters=parameters))
    await wire.inversions.DeleteInversion(inversion_service_pb2.DeleteInversionRequest(name=first.inversion))
    assert (await refused(wire.edits.Edit(first.resolved))).reason == "INVERSION_EXPIRED"
    resolved = edit_service_pb2.EditRequest()
    resolved.CopyFrom(first.resolved)
    resolved.image.CopyFrom(image)
    again = await wire.edits.Edit(resolved)
    assert again.image.content == first.image.content
    assert again.resolved == first.resolved


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 7), ("strength", 0.5), ("guidance_scale", 2.0), ("source_prompt", "a dog"), ("ddim.convention", 2)],
)
async def test_an_inversion_is_not_what_its_parameters_say_and_that_is_refused(
    wire: Wire, field: str, value: Any
) -> None:
    """Ignored, they would hide that the edit is another one than was meant."""
    first = await wire.edits.Edit(edit("ddim"))
    request = edit("ddim", inversion=first.inversion)
    part: Any = request.inversion_parameters
    *parents, name = field.split(".")
    for parent in parents:
        part = getattr(part, parent)
    setattr(part, name, value)
    assert (await refused(wire.edits.Edit(request))).paths == [f"inversion_parameters.{field}"]
    request.inversion_parameters.Clear()
    request.inversion_parameters.edict.SetInParent()
    assert (await refused(wire.edits.Edit(request))).paths == ["inversion_parameters.edict"]


async def test_a_resolved_sdedit_keeps_the_fitted_pixels_of_any_size(wire: Wire) -> None:
    image = photo((300, 100))
    image.fit = types_pb2.FIT_RESIZE
    first = await wire.edits.Edit(edit("sdedit", image=image))
    await wire.edits.Edit(first.resolved)
    fitted = [job.source.pixels for job in wire.engine.jobs]
    assert fitted[0].shape == (32, 96, 3)
    np.testing.assert_array_equal(fitted[0], fitted[1])


async def test_the_second_edit_of_an_image_starts_from_the_store(wire: Wire) -> None:
    first = await wire.edits.Edit(edit("edict", seed=1))
    second = await wire.edits.Edit(edit("edict", seed=1))
    assert isinstance(wire.engine.jobs[0].source, Photo)
    assert isinstance(wire.engine.jobs[1].source, Stored)
    assert (first.usage.inversion_cache_hit, second.usage.inversion_cache_hit) == (False, True)
    assert second.image.content == first.image.content
    assert second.inversion == first.inversion


async def test_an_inversion_that_cannot_be_stored_costs_nothing_but_its_name(wire: Wire) -> None:
    wire.context.stores.inversions._max_entry_bytes = 100
    first = await wire.edits.Edit(edit("edict"))
    assert first.inversion == ""
    assert first.resolved.WhichOneof("source") == "image"
    again = await wire.edits.Edit(first.resolved)
    assert again.image.content == first.image.content


async def test_seeds_are_drawn_once_and_reported(wire: Wire) -> None:
    drawn = [await wire.edits.Edit(edit("sdedit")) for _ in range(2)]
    assert drawn[0].resolved.seed != drawn[1].resolved.seed
    given = await wire.edits.Edit(edit("sdedit", seed=0))
    assert given.resolved.seed == 0
    assert [job.seed for job in wire.engine.jobs] == [*(a.resolved.seed for a in drawn), 0]


async def test_a_generated_source_is_filled_in(wire: Wire) -> None:
    answer = await wire.edits.Edit(edit("ddim", generated=edit_service_pb2.GeneratedSource(prompt="a cat")))
    source = wire.engine.jobs[0].source
    assert source == Generated("a cat", answer.resolved.generated.seed, 64, 48, 20)
    assert isinstance(wire.engine.jobs[0].method, DdimEdit)
    assert not answer.HasField("fitting")
    assert answer.inversion == ""


@pytest.mark.parametrize(("media_type", "kind"), [("", "PNG"), ("image/jpeg", "JPEG"), ("image/webp", "WEBP")])
async def test_the_answer_is_of_the_wanted_type(wire: Wire, media_type: str, kind: str) -> None:
    answer = await wire.edits.Edit(edit("sdedit", output_media_type=media_type))
    image = Image.open(io.BytesIO(answer.image.content))
    assert (image.format, image.size) == (kind, (64, 48))
    assert answer.image.media_type == media_type or answer.image.media_type == "image/png"


@pytest.mark.parametrize("size", [(200, 100), (64, 48)], ids=["as received", "as fitted"])
async def test_a_mask_is_fitted_like_its_image(wire: Wire, size: tuple[int, int]) -> None:
    grey = Image.new("L", size, 0)
    grey.paste(255, (size[0] // 2, 0, *size))
    request = edit("diffedit", image=photo((200, 100)))
    request.diffedit.mask.content = encoded(grey)
    first = await wire.edits.Edit(request)
    mask = wire.engine.jobs[0].method.mask
    assert mask.shape == (48, 64)
    assert (mask[:, :32] == 0).all()
    assert (mask[:, 32:] == 255).all()
    again = await wire.edits.Edit(first.resolved)
    assert again.image.content == first.image.content
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(again.mask.content))), mask)


async def test_a_mask_may_have_the_received_size_also_when_the_inversion_is_named(wire: Wire) -> None:
    made = await wire.edits.Edit(edit("ddim", image=photo((200, 100))))
    request = edit("diffedit", inversion=made.inversion)
    request.diffedit.mask.content = encoded(Image.new("L", (200, 100), 255))
    answer = await wire.edits.Edit(request)
    assert (wire.engine.jobs[1].method.mask == 255).all()
    assert answer.fitting == made.fitting


async def test_the_answer_tells_what_was_done_to_the_image(wire: Wire) -> None:
    answer = await wire.edits.Edit(edit("edict", image=photo((200, 100))))
    assert answer.fitting == types_pb2.Fitting(
        fit=types_pb2.FIT_CROP, source_width=200, source_height=100, width=64, height=48, source_left=33,
        source_box_width=133, source_box_height=100, box_width=64, box_height=48,
    )  # fmt: skip


async def test_usage_and_notices_reach_the_caller(wire: Wire) -> None:
    wire.engine.held = True
    call = wire.edits.Edit(edit("sdedit"))
    await wire.engine.submitted.wait()
    result: Any = computed(wire.engine.jobs[0], MINI)
    object.__setattr__(result, "notices", (Notice("PROMPT_TRUNCATED", "cut"),))
    wire.engine.handles[0].end(result)
    answer = await call
    assert answer.usage.queue_time.ToMilliseconds() == 500
    assert answer.usage.compute_time.ToMilliseconds() == 1250
    assert (answer.usage.network_evaluations, answer.usage.mean_batch_size) == (40, 2.0)
    assert [(n.reason, n.message) for n in answer.notices] == [("PROMPT_TRUNCATED", "cut")]
    assert dict(iter(await call.trailing_metadata()))["server-timing"] == "queue;dur=500.0, compute;dur=1250.0"


async def test_compute_mask_inverts_nothing(wire: Wire) -> None:
    request = edit_service_pb2.ComputeMaskRequest(edit=edit("diffedit", seed=3))
    answer = await wire.edits.ComputeMask(request)
    job = wire.engine.jobs[0]
    assert isinstance(job, MaskJob)
    assert job.inversion.num_inference_steps == 20
    assert answer.coverage == 1.0
    assert (answer.difference.dtype, list(answer.difference.shape)) == (types_pb2.DATA_TYPE_FLOAT32, [6, 8])
    difference = np.frombuffer(answer.difference.data, "<f4")
    assert difference.size == 48
    again = await wire.edits.ComputeMask(edit_service_pb2.ComputeMaskRequest(edit=answer.resolved))
    assert again.difference == answer.difference
    assert again.resolved == answer.resolved


async def test_the_mask_of_a_named_inversion(wire: Wire) -> None:
    made = await wire.edits.Edit(edit("ddim"))
    request = edit_service_pb2.ComputeMaskRequest(edit=edit("diffedit", inversion=made.inversion))
    answer = await wire.edits.ComputeMask(request)
    assert answer.inversion == made.inversion
    assert answer.resolved.inversion == made.inversion


async def test_a_computed_mask_can_be_given_back(wire: Wire) -> None:
    image = photo((200, 100))
    mask = await wire.edits.ComputeMask(edit_service_pb2.ComputeMaskRequest(edit=edit("diffedit", image=image)))
    request = edit("diffedit", image=image)
    request.diffedit.mask.CopyFrom(mask.mask)
    await wire.edits.Edit(request)
    assert (wire.engine.jobs[-1].method.mask == 255).all()


# --- streams ----------------------------------------------------------------------------------------------------


async def first(call: Any, wanted: Callable[[Any], bool]) -> Any:
    """The first event that is ``wanted``; progress is repeated where nothing happens for a while."""
    async with asyncio.timeout(PATIENCE_S):
        while not wanted(event := await call.read()):
            assert event is not grpc.aio.EOF
    return event


async def test_a_stream_is_accepted_then_progress_and_previews_then_the_result(wire: Wire) -> None:
    wire.engine.held = True
    call = wire.edits.StreamEdit(edit_service_pb2.StreamEditRequest(edit=edit("edict"), preview_every=2))
    accepted = await call.read()
    assert accepted.accepted.request_id
    handle = wire.engine.handles[0]
    assert handle.preview_every == 2
    queued = await call.read()
    assert queued.progress.phase == types_pb2.PHASE_QUEUED
    handle.advance(Progress(Phase.INVERTING, 3, 16, 0.25, eta_s=1.5), 10)
    running = await first(call, lambda event: event.progress.phase != types_pb2.PHASE_QUEUED)
    assert running.progress == types_pb2.Progress(
        phase=types_pb2.PHASE_INVERTING, step=3, total_steps=16, fraction=0.25, eta=running.progress.eta
    )
    assert running.progress.eta.ToMilliseconds() == 1500
    handle.show(Preview(np.zeros((48, 64, 3), np.uint8), 4))
    shown = await first(call, lambda event: event.WhichOneof("event") == "preview")
    preview = Image.open(io.BytesIO(shown.preview.image.content))
    assert (preview.format, preview.size, shown.preview.step) == ("JPEG", (256, 192), 4)
    wire.engine.finish(handle)
    result = await first(call, lambda event: event.WhichOneof("event") == "result")
    assert result.result.inversion
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize(("asked", "size"), [(0, (256, 192)), (32, (32, 24)), (1024, (256, 192))])
async def test_previews_are_as_large_as_asked_and_never_four_times_the_picture(
    wire: Wire, asked: int, size: tuple[int, int]
) -> None:
    wire.engine.held = True
    request = edit_service_pb2.StreamEditRequest(edit=edit("sdedit"), preview_every=1, preview_size=asked)
    call = wire.edits.StreamEdit(request)
    await call.read()
    wire.engine.handles[0].show(Preview(np.zeros((48, 64, 3), np.uint8), 1))
    event = await first(call, lambda event: event.WhichOneof("event") == "preview")
    assert Image.open(io.BytesIO(event.preview.image.content)).size == size
    call.cancel()


async def test_previews_are_for_those_who_asked(wire: Wire) -> None:
    wire.engine.held = True
    request = edit("edict", request_id=str(uuid4()))
    asked = wire.edits.StreamEdit(edit_service_pb2.StreamEditRequest(edit=request, preview_every=1))
    await asked.read()
    plain = wire.edits.StreamEdit(edit_service_pb2.StreamEditRequest(edit=request))
    await plain.read()
    (handle,) = wire.engine.handles
    handle.show(Preview(np.zeros((48, 64, 3), np.uint8), 1))
    await first(asked, lambda event: event.WhichOneof("event") == "preview")
    handle.advance(Progress(Phase.INVERTING, 3, 16, 0.25), 10)
    event = await first(
        plain, lambda event: event.progress.phase == types_pb2.PHASE_INVERTING or event.HasField("preview")
    )
    assert not event.HasField("preview")
    wire.engine.finish(handle)
    event = await first(plain, lambda event: event.WhichOneof("event") in ("preview", "result"))
    assert event.HasField("result")
    asked.cancel()


async def test_a_refused_stream_sends_nothing_at_all_before(wire: Wire) -> None:
    call = wire.edits.StreamEdit(edit_service_pb2.StreamEditRequest(edit=edit("edict", target_prompt="x" * 101)))
    refusal = await refused(call)
    assert refusal.paths == ["edit.target_prompt"]
    assert not tuple(await call.initial_metadata())


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_caller_that_leaves_frees_its_job(wire: Wire, streamed: bool) -> None:
    wire.engine.held = True
    request = edit("edict")
    stream = edit_service_pb2.StreamEditRequest(edit=request)
    call = wire.edits.StreamEdit(stream) if streamed else wire.edits.Edit(request)
    if streamed:
        await call.read()
    await wire.engine.submitted.wait()
    call.cancel()
    await until(lambda: wire.engine.cancelled)
    assert wire.engine.cancelled == wire.engine.handles


async def test_the_callers_deadline_reaches_the_engine(wire: Wire) -> None:
    await wire.edits.Edit(edit("sdedit"), timeout=50)
    await wire.edits.Edit(edit("sdedit"))
    with_deadline, without = wire.engine.deadlines
    assert with_deadline is not None
    assert 0 < with_deadline < 100  # gRPC rounds what it sends up
    assert without is None


async def test_priority_and_named_model_reach_the_engine(wire: Wire) -> None:
    request = edit("sdedit", model="models/other", priority=types_pb2.PRIORITY_INTERACTIVE)
    answer = await wire.edits.Edit(request)
    assert wire.engine.jobs[0].model == "other"
    assert wire.engine.handles[0].priority is Priority.INTERACTIVE
    assert answer.resolved.model == "models/other"
    assert (await wire.edits.Edit(edit("sdedit"))).resolved.model == "models/mini"
