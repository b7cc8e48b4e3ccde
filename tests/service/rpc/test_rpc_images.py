"""Images on their way through the front process: none of them holds up another call, whatever its bytes are."""

import asyncio
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import psutil
import pytest
from PIL import Image
from support.front import DECODER, SETTINGS, Wire, edit, encoded, photo, picture, refused, started
from support.hostile import png, png_chunk, png_header
from support.waiting import until
from underpaint.v1 import direction_service_pb2, model_service_pb2, types_pb2
from underpaint_server.rpc.calls.limits import CallLimits

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@contextmanager
def busy_decoders() -> Iterator[None]:
    """No image is decoded meanwhile."""
    if DECODER.pid is None:
        DECODER.start()
    host = psutil.Process(DECODER.pid)
    host.suspend()
    try:
        yield
    finally:
        host.resume()


async def test_answers_are_encoded_and_health_answers_while_every_decoder_is_busy(wire: Wire) -> None:
    with busy_decoders():
        waiting = [asyncio.ensure_future(wire.edits.Edit(edit("sdedit"))) for _ in range(12)]
        for media_type in ("image/png", "image/jpeg", "image/webp"):
            request = edit("ddim", generated={"prompt": "a leaf"}, output_media_type=media_type)
            answer = await wire.edits.Edit(request)
            assert answer.image.media_type == media_type
        assert not any(call.done() for call in waiting)
    assert all(answer.image.content for answer in await asyncio.gather(*waiting))


async def test_a_caller_s_deadline_frees_its_place(wire: Wire) -> None:
    places = SETTINGS.max_running + SETTINGS.queue_capacity
    with busy_decoders():
        for _ in range(3):
            calls = [wire.edits.Edit(edit("sdedit"), timeout=0.2) for _ in range(places)]
            ends = await asyncio.gather(*calls, return_exceptions=True)
            assert {end.code() for end in ends} <= {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}
            await until(lambda: wire.context.limits.held_bytes == 0)
    assert (await wire.edits.Edit(edit("sdedit"))).image.content


async def test_a_caller_who_cancels_frees_its_place(wire: Wire) -> None:
    with busy_decoders():
        calls = [wire.edits.Edit(edit("sdedit")) for _ in range(30)]
        await until(lambda: wire.context.limits.held_bytes > 0)
        for call in calls:
            call.cancel()
        await until(lambda: wire.context.limits.held_bytes == 0)
    assert (await wire.edits.Edit(edit("sdedit"))).image.content


async def test_images_of_all_calls_together_have_a_limit_of_bytes() -> None:
    request = edit("sdedit", image=types_pb2.Image(content=encoded(picture()) + bytes(40_000)))
    async with started(SETTINGS.model_copy(update={"request_bytes": 2 * request.ByteSize()})) as wire:
        wire.engine.held = True
        running = [asyncio.ensure_future(wire.edits.Edit(request)) for _ in range(2)]
        await until(lambda: len(wire.engine.handles) == 2)
        refusal = await refused(wire.edits.Edit(request))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL")
        assert refusal.details["RetryInfo"].retry_delay.ToMilliseconds() > 0
        running[0].cancel()
        await until(lambda: wire.context.limits.held_bytes == request.ByteSize())
        again = asyncio.ensure_future(wire.edits.Edit(request))
        await until(lambda: len(wire.engine.handles) == 3)
        for handle in wire.engine.handles:
            if handle not in wire.engine.cancelled:
                wire.engine.finish(handle)
        await asyncio.gather(running[1], again)
        await until(lambda: wire.context.limits.held_bytes == 0)


async def test_one_request_larger_than_the_limit_is_accepted_alone() -> None:
    async with started(SETTINGS.model_copy(update={"request_bytes": 1})) as wire:
        assert (await wire.edits.Edit(edit("sdedit"))).image.content
        await wire.models.ListModels(model_service_pb2.ListModelsRequest())


def test_what_a_call_holds_is_given_back_however_it_ends() -> None:
    limits = CallLimits(max_calls=9, max_slow=9, arrival_s=9, max_bytes=10)

    def failing() -> None:
        with limits.call("/a.A/A", 10):
            assert limits.held_bytes == 10
            raise ValueError("the call")

    with pytest.raises(ValueError, match="the call"):
        failing()
    assert limits.held_bytes == 0


def animation(kind: str) -> bytes:
    out = io.BytesIO()
    frames = [picture(seed=seed) for seed in range(3)]
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


def still(kind: str) -> bytes:
    """A file of one frame that could have more."""
    out = io.BytesIO()
    picture().save(out, kind, save_all=True, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


NO_PALETTE = png_header(64, 48, colour=3) + png(64, 48)[33:]
UNDECODABLE = {
    "an animated png": (animation("PNG"), "3 frames"),
    "an animated webp": (animation("WEBP"), "3 frames"),
    "a palette image without its palette": (NO_PALETTE, "cannot be decoded"),
    "no pixels": (png_header(64, 0), "no pixels"),
    "a png with a chunk that is cut": (png(64, 48, png_chunk(b"tEXt", b"a\0b")[:-6]), "cannot be decoded"),
}


@pytest.mark.parametrize("case", UNDECODABLE)
@pytest.mark.parametrize("field", ["image", "mask", "content"])
async def test_an_image_that_cannot_be_one_picture_is_refused_with_the_reason(
    wire: Wire, case: str, field: str
) -> None:
    content, reason = UNDECODABLE[case]
    bad = types_pb2.Image(content=content)
    requests: dict[str, Any] = {
        "image": lambda: edit("sdedit", image=bad),
        "mask": lambda: edit("diffedit", diffedit={"mask": bad}),
        "content": lambda: edit("content_injection", content_injection={"image": bad}),
    }
    refusal = await refused(wire.edits.Edit(requests[field]()))
    assert (refusal.code, refusal.reason) == (INVALID, "IMAGE_UNDECODABLE")
    assert reason in refusal.message
    assert " at 0x" not in refusal.message, "no addresses of the process"
    assert wire.engine.jobs == []


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
async def test_an_animation_of_one_frame_is_a_picture(wire: Wire, kind: str) -> None:
    first = await wire.edits.Edit(edit("sdedit", image=types_pb2.Image(content=still(kind)), seed=1))
    second = await wire.edits.Edit(edit("sdedit", image=photo(), seed=1))
    assert first.image.content == second.image.content


async def test_a_camera_s_file_with_further_views_is_its_first_picture(wire: Wire) -> None:
    out = io.BytesIO()
    options = {"quality": 95, "subsampling": 0}
    picture().save(out, "MPO", save_all=True, append_images=[picture(seed=1)], **options)
    first = await wire.edits.Edit(edit("sdedit", image=types_pb2.Image(content=out.getvalue()), seed=1))
    alone = encoded(picture(), "JPEG", **options)
    second = await wire.edits.Edit(edit("sdedit", image=types_pb2.Image(content=alone), seed=1))
    assert first.image.content == second.image.content


async def test_a_mask_of_wrong_shape_is_a_field_and_not_an_image_error(wire: Wire) -> None:
    mask = types_pb2.Image(content=encoded(Image.new("L", (31, 31))))
    refusal = await refused(wire.edits.Edit(edit("diffedit", diffedit={"mask": mask})))
    assert (refusal.reason, refusal.paths) == ("FIELD_INVALID", ["diffedit.mask"])


async def test_an_example_s_image_is_checked_like_any_other(wire: Wire) -> None:
    direction = direction_service_pb2.Direction(source_prompt="a", target_prompt="b")
    examples = [direction_service_pb2.DirectionExample(image=types_pb2.Image(content=animation("PNG")))]
    request = direction_service_pb2.LearnDirectionRequest(direction=direction, examples=examples)
    assert (await refused(wire.directions.LearnDirection(request))).reason == "IMAGE_UNDECODABLE"
