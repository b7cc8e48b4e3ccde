"""Everything that can be wrong with a request, on the running server: what it says, and that nothing of it stays."""

import asyncio
import struct
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import inf, nan
from typing import Any
from uuid import uuid4

import grpc
import psutil
import pytest
from e2e.harness import Stubs, disc, idle, scrape, stubs
from PIL import Image
from support.front import edit, encoded, merged, photo, picture, refusal, refused
from support.hostile import many_scans, png, png_header
from underpaint import Client, Edict, errors
from underpaint.v1 import edit_service_pb2, inversion_service_pb2, model_service_pb2, types_pb2
from underpaint_server.local_server import LocalServer

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


def bomb(width: int, height: int) -> bytes:
    """A complete PNG of so many white pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress((b"\0" + b"\xff" * ((width + 7) // 8)) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def image(content: bytes, media_type: str = "") -> types_pb2.Image:
    return types_pb2.Image(content=content, media_type=media_type)


def invert(**fields: Any) -> inversion_service_pb2.InvertRequest:
    good: dict[str, Any] = {"image": photo(), "parameters": {"edict": {}, "steps": 4}}
    return inversion_service_pb2.InvertRequest(**good | fields)


@dataclass(frozen=True)
class Bad:
    """A request, and what it must be told."""

    request: Any
    paths: tuple[str, ...] = ()
    reason: str = "FIELD_INVALID"
    code: grpc.StatusCode = INVALID

    def call(self, wire: Stubs) -> Awaitable[Any]:
        """Send it to the RPC whose request it is."""
        rpcs: dict[type, Callable[[Any], Awaitable[Any]]] = {
            edit_service_pb2.EditRequest: wire.edits.Edit,
            edit_service_pb2.StreamEditRequest: wire.edits.StreamEdit,
            edit_service_pb2.ComputeMaskRequest: wire.edits.ComputeMask,
            inversion_service_pb2.InvertRequest: wire.inversions.Invert,
            inversion_service_pb2.StreamInvertRequest: wire.inversions.StreamInvert,
            inversion_service_pb2.GetInversionRequest: wire.inversions.GetInversion,
            inversion_service_pb2.DeleteInversionRequest: wire.inversions.DeleteInversion,
            inversion_service_pb2.ExportInversionRequest: wire.inversions.ExportInversion,
            inversion_service_pb2.ListInversionsRequest: wire.inversions.ListInversions,
            model_service_pb2.GetModelRequest: wire.models.GetModel,
            model_service_pb2.ListModelsRequest: wire.models.ListModels,
        }
        return rpcs[type(self.request)](self.request)


def field(path: str, request: Any) -> Bad:
    return Bad(request, (path,))


def undecodable(content: bytes, media_type: str = "") -> Bad:
    return Bad(edit(image=image(content, media_type)), reason="IMAGE_UNDECODABLE")


def too_large(content: bytes) -> Bad:
    return Bad(edit(image=image(content)), reason="IMAGE_TOO_LARGE")


def parameters(**fields: Any) -> edit_service_pb2.EditRequest:
    return edit(inversion_parameters=fields)


ABSENT = "inversions/" + "a" * 64
GENERATED = {"prompt": "a corgi", "steps": 4}

BAD: dict[str, Bad] = {
    # pictures
    "no bytes": undecodable(b""),
    "text": undecodable(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "gif": undecodable(encoded(picture(), "GIF")),
    "png cut short": undecodable(encoded(picture())[:300]),
    "jpeg cut short": undecodable(encoded(picture(), "JPEG")[:300]),
    "webp cut short": undecodable(encoded(picture(), "WEBP")[:100]),
    "noise behind a png's first bytes": undecodable(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4),
    "png declared as jpeg": undecodable(encoded(picture()), "image/jpeg"),
    "declared as what nobody knows": undecodable(encoded(picture()), "image/bmp"),
    "no pixels": undecodable(bomb(0, 0)),
    "a bomb": too_large(bomb(5000, 5000)),
    "a row too much": too_large(bomb(512, 513)),
    "a single column": too_large(bomb(1, 40_000)),
    "a jpeg of very many scans": too_large(many_scans(2000, 256, 256)),
    "an animation": undecodable(encoded(picture(), "WEBP", save_all=True, append_images=[picture(seed=1)])),
    "a palette that is not there": undecodable(png_header(64, 48, colour=3) + png(64, 48)[33:]),
    "a byte too much": too_large(encoded(picture()) + bytes(60_000)),
    "mask undecodable": Bad(edit("diffedit", diffedit={"mask": image(b"x")}), reason="IMAGE_UNDECODABLE"),
    "mask too large": Bad(edit("diffedit", diffedit={"mask": image(bomb(600, 600))}), reason="IMAGE_TOO_LARGE"),
    "inverting no picture": Bad(invert(image=image(b"x")), reason="IMAGE_UNDECODABLE"),
    "a message over the limit of messages": Bad(
        edit(image=image(bytes(1_000_001))), reason="PAYLOAD_TOO_LARGE", code=grpc.StatusCode.RESOURCE_EXHAUSTED
    ),
    # masks
    "mask of another size": field(
        "diffedit.mask", edit("diffedit", diffedit={"mask": image(encoded(Image.new("L", (31, 32))))})
    ),
    "transparent mask": field(
        "diffedit.mask", edit("diffedit", diffedit={"mask": image(encoded(Image.new("LA", (64, 48))))})
    ),
    "threshold for a given mask": field(
        "diffedit.threshold",
        edit("diffedit", diffedit={"mask": image(encoded(Image.new("L", (64, 48)))), "threshold": 0.5}),
    ),
    # what is missing
    "no source": field("source", merged(edit_service_pb2.EditRequest(), target_prompt="a corgi", edict={})),
    "no method": field("method", edit("")),
    "no target prompt": field("target_prompt", merged(edit_service_pb2.EditRequest(), image=photo(), edict={})),
    "an empty edit": Bad(edit_service_pb2.EditRequest(), ("method", "source", "target_prompt")),
    "inverting without a method": field("parameters.method", invert(parameters={})),
    "inverting without an image": field(
        "image", merged(inversion_service_pb2.InvertRequest(), parameters={"ddim": {}, "steps": 4})
    ),
    # numbers
    "strength above 1": field("sdedit.strength", edit("sdedit", sdedit={"strength": 1.01})),
    "strength 0": field("sdedit.strength", edit("sdedit", sdedit={"strength": 0})),
    "strength negative": field("sdedit.strength", edit("sdedit", sdedit={"strength": -0.5})),
    "strength NaN": field("sdedit.strength", edit("sdedit", sdedit={"strength": nan})),
    "inversion strength NaN": field("inversion_parameters.strength", parameters(strength=nan)),
    "inversion strength above 1": field("parameters.strength", invert(parameters={"edict": {}, "strength": 2})),
    "guidance NaN": field("guidance_scale", edit(guidance_scale=nan)),
    "guidance infinite": field("guidance_scale", edit(guidance_scale=inf)),
    "guidance negative": field("guidance_scale", edit(guidance_scale=-1)),
    "guidance above the limit": field("guidance_scale", edit(guidance_scale=30.5)),
    "inversion guidance NaN": field("inversion_parameters.guidance_scale", parameters(guidance_scale=nan)),
    "threshold 1": field("diffedit.threshold", edit("diffedit", diffedit={"threshold": 1})),
    "threshold NaN": field("diffedit.threshold", edit("diffedit", diffedit={"threshold": nan})),
    "mask strength 0": field("diffedit.mask_strength", edit("diffedit", diffedit={"mask_strength": 0})),
    "too many samples": field("diffedit.samples", edit("diffedit", diffedit={"samples": 17})),
    "negative samples": field("diffedit.samples", edit("diffedit", diffedit={"samples": -1})),
    "mixing coefficient 0": field(
        "inversion_parameters.edict.mixing_coefficient", parameters(edict={"mixing_coefficient": 0})
    ),
    "too many steps": field("inversion_parameters.steps", parameters(steps=51)),
    "negative steps": field("sdedit.steps", edit("sdedit", sdedit={"steps": -1})),
    "too many steps of a drawing": field("generated.steps", edit(generated=GENERATED | {"steps": 51})),
    "a side that is no multiple": field("generated.width", edit(generated=GENERATED | {"width": 33})),
    "a drawing too large": field("generated", edit(generated=GENERATED | {"width": 80, "height": 80})),
    "negative previews": field("preview_every", edit_service_pb2.StreamEditRequest(edit=edit(), preview_every=-1)),
    # texts
    "target prompt too long": field("target_prompt", edit(target_prompt="x" * 101)),
    "negative prompt too long": field("negative_prompt", edit(negative_prompt="x" * 101)),
    "source prompt too long": field("inversion_parameters.source_prompt", parameters(source_prompt="x" * 101)),
    "reference prompt too long": field(
        "diffedit.reference_prompt", edit("diffedit", diffedit={"reference_prompt": "x" * 101})
    ),
    # choices
    "fit of the future": field("image.fit", edit(image=merged(photo(), fit=9))),
    "priority of the future": field("priority", edit(priority=9)),
    "convention of the future": field(
        "inversion_parameters.ddim.convention", edit("ddim", inversion_parameters={"ddim": {"convention": 9}})
    ),
    "gif wanted": field("output_media_type", edit(output_media_type="image/gif")),
    "no UUID4": field("request_id", edit(request_id="42")),
    # what does not go together
    "another inversion than the method's": field(
        "inversion_parameters.method", edit("edict", inversion_parameters={"ddim": {}})
    ),
    "inversion parameters nobody uses": field(
        "inversion_parameters", edit("sdedit", inversion_parameters={"steps": 4})
    ),
    "inversion parameters of a drawing": field(
        "inversion_parameters", edit(generated=GENERATED, inversion_parameters={"steps": 4})
    ),
    "mask of another method": field("edit.method", edit_service_pb2.ComputeMaskRequest(edit=edit("edict"))),
    "several at once": Bad(
        edit("sdedit", sdedit={"strength": 2}, guidance_scale=31, seed=1), ("sdedit.strength", "guidance_scale")
    ),
    "nested in a stream": field(
        "edit.guidance_scale", edit_service_pb2.StreamEditRequest(edit=edit(guidance_scale=99))
    ),
    "nested in a mask": field(
        "edit.diffedit.threshold",
        edit_service_pb2.ComputeMaskRequest(edit=edit("diffedit", diffedit={"threshold": 7})),
    ),
    "nested in a stream of an inversion": field(
        "invert.parameters.steps",
        inversion_service_pb2.StreamInvertRequest(invert=invert(parameters={"edict": {}, "steps": 999})),
    ),
    # names
    "unknown model": Bad(edit(model="models/none"), reason="MODEL_NOT_FOUND", code=NOT_FOUND),
    "unknown model asked for": Bad(
        model_service_pb2.GetModelRequest(name="models/none"), reason="MODEL_NOT_FOUND", code=NOT_FOUND
    ),
    "no model's name": field("model", edit(model="toy")),
    "unknown inversion": Bad(edit(inversion=ABSENT), reason="INVERSION_EXPIRED", code=NOT_FOUND),
    "unknown inversion looked up": Bad(
        inversion_service_pb2.GetInversionRequest(name=ABSENT), reason="INVERSION_EXPIRED", code=NOT_FOUND
    ),
    "unknown inversion deleted": Bad(
        inversion_service_pb2.DeleteInversionRequest(name=ABSENT), reason="INVERSION_EXPIRED", code=NOT_FOUND
    ),
    "unknown inversion exported": Bad(
        inversion_service_pb2.ExportInversionRequest(name=ABSENT), reason="INVERSION_EXPIRED", code=NOT_FOUND
    ),
    "a path for a name": field("inversion", edit(inversion="inversions/../../etc/passwd")),
    "a path for a name looked up": field("name", inversion_service_pb2.GetInversionRequest(name="inversions/../x")),
    "a page too large": field("page_size", inversion_service_pb2.ListInversionsRequest(page_size=1001)),
    "a page nobody gave": field("page_token", inversion_service_pb2.ListInversionsRequest(page_token="?")),
    "a page of models nobody gave": field("page_token", model_service_pb2.ListModelsRequest(page_token="?")),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_request_is_told_what_is_wrong_with_it(toy: LocalServer, case: str) -> None:
    bad = BAD[case]
    async with stubs(toy) as wire:
        if bad.reason:
            told = await refused(bad.call(wire))
            assert (told.code, told.reason) == (bad.code, bad.reason)
            assert told.message
            if bad.paths:
                assert set(told.paths) == set(bad.paths)
                assert all(violation.description for violation in told.details["BadRequest"].field_violations)
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await bad.call(wire)
            assert caught.value.code() is bad.code


async def test_nothing_of_any_number_of_bad_requests_stays(toy: LocalServer) -> None:
    before = await idle(toy)
    async with stubs(toy) as wire:
        calls = [bad.call(wire) for bad in BAD.values()]
        ended = await asyncio.gather(*map(_read, calls), return_exceptions=True)
        assert all(isinstance(error, grpc.aio.AioRpcError) for error in ended)
        assert scrape(toy).sum("underpaint_num_requests_waiting") == 0
        assert (await wire.edits.Edit(edit("sdedit"))).image.content
    after = await idle(toy)
    assert _inversions(after) == _inversions(before)
    rows = "underpaint_network_rows_total"
    assert after.sum(rows) - after.sum(rows, method="sdedit") == before.sum(rows) - before.sum(rows, method="sdedit")
    for reason in {bad.reason for bad in BAD.values() if bad.reason}:
        told = sum(bad.reason == reason for bad in BAD.values())
        total = "underpaint_requests_total"
        assert after.sum(total, reason=reason) == before.sum(total, reason=reason) + told
    assert "Traceback" not in toy.tail(10_000)


async def test_images_are_decoded_again_after_the_process_that_does_it_was_killed(toy: LocalServer) -> None:
    def host() -> psutil.Process | None:
        children = psutil.Process(toy.pid).children()
        return next((child for child in children if "underpaint_server.decoder.host" in child.cmdline()), None)

    async with stubs(toy) as wire:
        first = host()
        assert first is not None
        for _ in range(2):
            killed = host()
            assert killed is not None
            killed.kill()
            assert (await wire.edits.Edit(edit("sdedit"))).image.content
        again = host()
        assert again is not None
        assert again.pid != first.pid


async def test_a_request_id_with_another_payload_is_refused(toy: LocalServer) -> None:
    request_id = str(uuid4())
    async with stubs(toy) as wire:
        await wire.edits.Edit(edit("sdedit", seed=1, request_id=request_id))
        told = await refused(wire.edits.Edit(edit("sdedit", seed=2, request_id=request_id)))
    assert (told.code, told.reason) == (INVALID, "REQUEST_ID_REUSED")


async def test_an_inversion_of_other_weights_is_refused(toy: LocalServer) -> None:
    async with stubs(toy) as wire:
        made = await wire.edits.Edit(edit(model="models/other"))
        told = await refused(wire.edits.Edit(edit(inversion=made.inversion, model="models/toy")))
    assert (told.code, told.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "INVERSION_MODEL_MISMATCH")
    assert told.details["PreconditionFailure"].violations[0].subject == made.inversion


async def test_an_inversion_of_another_method_is_refused(toy: LocalServer) -> None:
    async with stubs(toy) as wire:
        made = await wire.edits.Edit(edit("edict"))
        told = await refused(wire.edits.Edit(edit("diffedit", inversion=made.inversion)))
    assert (told.code, told.reason, told.paths) == (INVALID, "FIELD_INVALID", ["inversion"])


async def test_extreme_values_that_go_beyond_numbers_are_named_and_hit_nobody_else(toy: LocalServer) -> None:
    async with stubs(toy) as wire:
        # A mixing coefficient of 1e-6 multiplies the difference of the coupled latents by 1e12 in each step.
        wild = edit(inversion_parameters={"edict": {"mixing_coefficient": 1e-6}, "steps": 50, "strength": 1})
        told, good = await asyncio.gather(refused(wire.edits.Edit(wild)), wire.edits.Edit(edit("sdedit")))
        assert (told.code, told.reason) == (INVALID, "NON_FINITE_LATENTS")
        assert told.paths == ["inversion_parameters.edict.mixing_coefficient"]
        assert good.image.content
        stream = wire.edits.StreamEdit(edit_service_pb2.StreamEditRequest(edit=wild))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stream:
                pass
        assert refusal(caught.value).paths == ["edit.inversion_parameters.edict.mixing_coefficient"]
    assert "Traceback" not in toy.tail(10_000)


def test_the_client_raises_its_own_tree(toy: LocalServer) -> None:
    with Client(toy.target) as client:
        with pytest.raises(errors.FieldInvalid) as caught:
            client.edit(disc(), "a corgi", Edict(strength=2))
        assert [violation.path for violation in caught.value.violations] == ["inversion_parameters.strength"]
        with pytest.raises(errors.ImageUndecodable):
            client.edit(b"x", "a corgi")
        with pytest.raises(errors.ImageTooLarge) as large:
            client.edit(bomb(5000, 5000), "a corgi")
        assert large.value.metadata == {"unit": "pixels", "limit": "262144", "actual": "25000000"}
        with pytest.raises(errors.ImageTooLarge) as large:
            client.edit(bytes(60_001), "a corgi")
        assert large.value.metadata == {"unit": "bytes", "limit": "60000", "actual": "60001"}
        with pytest.raises(errors.PayloadTooLarge):
            client.edit(bytes(1_000_001), "a corgi")
        with pytest.raises(errors.ModelNotFound):
            client.edit(disc(), "a corgi", model="none")
        with pytest.raises(errors.InversionExpired):
            client.edit(ABSENT, "a corgi")


async def _read(call: Any) -> Any:
    return await (call.read() if hasattr(call, "read") else call)


def _inversions(now: Any) -> float:
    return float(now.sum("underpaint_inversion_store_entries"))
