"""Every kind of bad request: its code, its reason, the field it names, and that the engine never hears of it."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import uuid4

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.front import MINI, SETTINGS, Wire, edit, encoded, merged, photo, picture, refused
from underpaint.v1 import edit_service_pb2, inversion_service_pb2, types_pb2
from underpaint_server.errors import FieldInvalid, QueueFull
from underpaint_server.rpc.requests.edit import edit_draft

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NAN, INF = float("nan"), float("inf")


def image(content: bytes, media_type: str = "") -> types_pb2.Image:
    return types_pb2.Image(content=content, media_type=media_type)


def header_only(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and has next to nothing else to say."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(99)))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def parameters(**fields: Any) -> inversion_service_pb2.InversionParameters:
    return inversion_service_pb2.InversionParameters(**fields)


def edict(mixing_coefficient: float) -> inversion_service_pb2.InversionParameters:
    return parameters(edict=inversion_service_pb2.EdictInversion(mixing_coefficient=mixing_coefficient))


def sdedit(**fields: Any) -> edit_service_pb2.EditRequest:
    return edit("sdedit", sdedit=edit_service_pb2.SdEdit(**fields))


def diffedit(**fields: Any) -> edit_service_pb2.EditRequest:
    return edit("diffedit", diffedit=edit_service_pb2.DiffEdit(**fields))


def generated(**fields: Any) -> edit_service_pb2.EditRequest:
    return edit("ddim", generated=edit_service_pb2.GeneratedSource(**fields))


FIELDS: dict[str, tuple[Callable[[], edit_service_pb2.EditRequest], list[str]]] = {
    "no method": (lambda: edit(""), ["method"]),
    "no source": (
        lambda: edit_service_pb2.EditRequest(target_prompt="x", sdedit=edit_service_pb2.SdEdit()),
        ["source"],
    ),
    "no target prompt": (
        lambda: edit_service_pb2.EditRequest(image=photo(), sdedit=edit_service_pb2.SdEdit()),
        ["target_prompt"],
    ),
    "long target prompt": (lambda: edit(target_prompt="x" * 101), ["target_prompt"]),
    "long negative prompt": (lambda: edit(negative_prompt="x" * 101), ["negative_prompt"]),
    "long source prompt": (
        lambda: edit(inversion_parameters=parameters(source_prompt="x" * 101)),
        ["inversion_parameters.source_prompt"],
    ),
    "too many steps": (lambda: edit(inversion_parameters=parameters(steps=51)), ["inversion_parameters.steps"]),
    "negative steps": (lambda: sdedit(steps=-1), ["sdedit.steps"]),
    "strength 0": (lambda: sdedit(strength=0), ["sdedit.strength"]),
    "strength above 1": (
        lambda: edit(inversion_parameters=parameters(strength=1.01)),
        ["inversion_parameters.strength"],
    ),
    "strength NaN": (lambda: sdedit(strength=NAN), ["sdedit.strength"]),
    "guidance above 30": (lambda: edit(guidance_scale=30.5), ["guidance_scale"]),
    "guidance below 0": (
        lambda: edit(inversion_parameters=parameters(guidance_scale=-1)),
        ["inversion_parameters.guidance_scale"],
    ),
    "guidance infinite": (lambda: edit(guidance_scale=INF), ["guidance_scale"]),
    "guidance NaN": (lambda: edit(guidance_scale=NAN), ["guidance_scale"]),
    "mixing 0": (lambda: edit(inversion_parameters=edict(0)), ["inversion_parameters.edict.mixing_coefficient"]),
    "threshold 0": (lambda: diffedit(threshold=0), ["diffedit.threshold"]),
    "threshold 1": (lambda: diffedit(threshold=1), ["diffedit.threshold"]),
    "threshold NaN": (lambda: diffedit(threshold=NAN), ["diffedit.threshold"]),
    "mask strength 1": (lambda: diffedit(mask_strength=1), ["diffedit.mask_strength"]),
    "too many samples": (lambda: diffedit(samples=17), ["diffedit.samples"]),
    "unused beside a mask": (
        lambda: diffedit(mask=photo(), threshold=0.4, samples=3, mask_strength=0.3, reference_prompt="x"),
        ["diffedit.threshold", "diffedit.samples", "diffedit.mask_strength", "diffedit.reference_prompt"],
    ),
    "unused by sdedit": (lambda: edit("sdedit", inversion_parameters=parameters(steps=5)), ["inversion_parameters"]),
    "unused by sdedit with an inversion": (
        lambda: edit("sdedit", inversion="inversions/" + "a" * 64, inversion_parameters=parameters(steps=5)),
        ["inversion_parameters"],
    ),
    "unused with a generated source": (
        lambda: edit(generated={"prompt": "x"}, inversion_parameters=edict(0.9)),
        ["inversion_parameters"],
    ),
    "the other inversion": (
        lambda: edit("ddim", inversion_parameters=edict(0.9)),
        ["inversion_parameters.method"],
    ),
    "generated sides": (lambda: generated(width=63, height=-8), ["generated.width", "generated.height"]),
    "generated area": (lambda: generated(width=1024, height=1024), ["generated"]),
    "generated steps": (lambda: generated(steps=51), ["generated.steps"]),
    "generated prompt": (lambda: generated(prompt="x" * 101), ["generated.prompt"]),
    "unknown fit": (lambda: edit(image=types_pb2.Image(fit=9)), ["image.fit"]),  # type: ignore[arg-type]
    "unknown priority": (lambda: edit(priority=9), ["priority"]),
    "unknown media type": (lambda: edit(output_media_type="image/gif"), ["output_media_type"]),
    "no inversion's name": (lambda: edit(inversion="inversions/../x"), ["inversion"]),
    "no model's name": (lambda: edit(model="mini"), ["model"]),
    "no UUID4": (lambda: edit(request_id="42"), ["request_id"]),
    "several at once": (lambda: edit(target_prompt="x" * 101, guidance_scale=31), ["target_prompt", "guidance_scale"]),
}


@pytest.mark.parametrize("case", FIELDS)
async def test_a_bad_field_is_named(wire: Wire, case: str) -> None:
    make, paths = FIELDS[case]
    refusal = await refused(wire.edits.Edit(make()))
    assert (refusal.code, refusal.reason, refusal.paths) == (INVALID, "FIELD_INVALID", paths)
    assert wire.engine.jobs == []


@pytest.mark.parametrize("case", ["no target prompt", "strength NaN", "no model's name", "no UUID4"])
async def test_a_bad_field_of_a_nested_request_is_named_by_its_whole_path(wire: Wire, case: str) -> None:
    make, paths = FIELDS[case]
    refusal = await refused(wire.edits.StreamEdit(edit_service_pb2.StreamEditRequest(edit=make())))
    assert refusal.paths == [f"edit.{path}" for path in paths]
    mask = edit_service_pb2.ComputeMaskRequest(edit=make())
    assert all(path.startswith("edit.") for path in (await refused(wire.edits.ComputeMask(mask))).paths)
    assert wire.engine.jobs == []


IMAGES = {
    "nothing": (image(b""), "IMAGE_UNDECODABLE"),
    "text": (image(b"<svg></svg>"), "IMAGE_UNDECODABLE"),
    "a gif": (image(encoded(picture(), "GIF")), "IMAGE_UNDECODABLE"),
    "cut short": (image(encoded(picture())[:400]), "IMAGE_UNDECODABLE"),
    "cut short jpeg": (image(encoded(picture(), "JPEG")[:400]), "IMAGE_UNDECODABLE"),
    "declared as another": (image(encoded(picture()), "image/jpeg"), "IMAGE_UNDECODABLE"),
    "no pixels": (image(header_only(0, 5)), "IMAGE_UNDECODABLE"),
    "a bomb's header": (image(header_only(60_000, 60_000)), "IMAGE_TOO_LARGE"),
    "a row too much": (image(header_only(512, 513)), "IMAGE_TOO_LARGE"),
    "too many bytes": (image(encoded(picture()) + bytes(60_000)), "IMAGE_TOO_LARGE"),
}


@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.parametrize("rpc", ["Edit", "Invert", "mask"])
async def test_a_bad_image_is_refused(wire: Wire, case: str, rpc: str) -> None:
    bad, reason = IMAGES[case]
    ddim = parameters(ddim=inversion_service_pb2.DdimInversion())
    if rpc == "Invert":
        call = wire.inversions.Invert(inversion_service_pb2.InvertRequest(image=bad, parameters=ddim))
    else:
        call = wire.edits.Edit(edit("sdedit", image=bad) if rpc == "Edit" else diffedit(mask=bad))
    refusal = await refused(call)
    assert (refusal.code, refusal.reason) == (INVALID, reason)
    assert wire.engine.jobs == []


@pytest.mark.parametrize(
    ("bad", "metadata"),
    [
        (header_only(60_000, 60_000), {"unit": "pixels", "limit": "262144", "actual": "3600000000"}),
        (bytes(60_001), {"unit": "bytes", "limit": "60000", "actual": "60001"}),
    ],
)
async def test_an_image_too_large_is_told_the_limit(wire: Wire, bad: bytes, metadata: dict[str, str]) -> None:
    assert (await refused(wire.edits.Edit(edit(image=image(bad))))).metadata == metadata


@pytest.mark.parametrize(
    "mask",
    [Image.new("L", (63, 48)), Image.new("L", (100, 200)), Image.new("RGBA", (64, 48)), Image.new("LA", (64, 48))],
)
async def test_a_mask_of_another_size_or_with_transparency_is_refused(wire: Wire, mask: Image.Image) -> None:
    request = edit("diffedit", image=photo((200, 100)), diffedit={"mask": image(encoded(mask))})
    refusal = await refused(wire.edits.Edit(request))
    assert (refusal.code, refusal.reason, refusal.paths) == (INVALID, "FIELD_INVALID", ["diffedit.mask"])
    if mask.mode == "L":
        assert all(f"{w}x{h}" in refusal.message for w, h in [mask.size, (200, 100), (64, 48)])
    assert wire.engine.jobs == []


async def test_an_unknown_model_is_told_which_there_are(wire: Wire) -> None:
    refusal = await refused(wire.edits.Edit(edit(model="models/none")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert "models/mini, models/other" in refusal.message
    assert refusal.details["ResourceInfo"].resource_name == "models/none"
    assert wire.engine.jobs == []


async def test_an_unknown_inversion_is_expired(wire: Wire) -> None:
    name = "inversions/" + "a" * 64
    refusal = await refused(wire.edits.Edit(edit(inversion=name)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "INVERSION_EXPIRED")
    assert refusal.details["ResourceInfo"].resource_name == name
    assert wire.engine.jobs == []


async def test_an_inversion_of_other_weights_is_refused(wire: Wire) -> None:
    made = await wire.edits.Edit(edit(model="models/other"))
    refusal = await refused(wire.edits.Edit(edit(inversion=made.inversion)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "INVERSION_MODEL_MISMATCH")
    (violation,) = refusal.details["PreconditionFailure"].violations
    assert (violation.type, violation.subject) == ("INVERSION_MODEL_MISMATCH", made.inversion)
    assert len(wire.engine.jobs) == 1


def restarted(wire: Wire, **changed: Any) -> None:
    """The engine comes back with another function behind the same weights."""
    wire.engine.models = {name: replace(info, **changed) for name, info in wire.engine.models.items()}


async def test_an_exact_inversion_by_another_function_is_refused_and_told_what_to_do(wire: Wire) -> None:
    made = await wire.edits.Edit(edit("edict"))
    restarted(wire, fingerprint="0" * 64)
    refusal = await refused(wire.edits.Edit(edit("edict", inversion=made.inversion)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "INVERSION_MODEL_MISMATCH")
    assert refusal.details["PreconditionFailure"].violations[0].subject == made.inversion
    for word in ("invert the image again", "--dtype", "--device", "--threads"):
        assert word in refusal.message
    assert len(wire.engine.jobs) == 1


@pytest.mark.parametrize("changed", [{"fingerprint": "0" * 64}, {"batch_class": 4}])
async def test_another_function_makes_its_own_inversion_of_an_image(wire: Wire, changed: dict[str, Any]) -> None:
    first = await wire.edits.Edit(edit("edict"))
    restarted(wire, **changed)
    second = await wire.edits.Edit(edit("edict"))
    assert second.inversion != first.inversion
    assert not second.usage.inversion_cache_hit


@pytest.mark.parametrize(("made_by", "used_by"), [("ddim", "ddim"), ("ddim", "diffedit"), ("edict", "sdedit")])
async def test_an_approximation_serves_any_function_of_the_same_weights(wire: Wire, made_by: str, used_by: str) -> None:
    made = await wire.edits.Edit(edit(made_by))
    restarted(wire, fingerprint="0" * 64)
    answer = await wire.edits.Edit(edit(used_by, inversion=made.inversion))
    assert answer.inversion == made.inversion


@pytest.mark.parametrize(("made_by", "used_by"), [("edict", "ddim"), ("edict", "diffedit"), ("ddim", "edict")])
async def test_an_inversion_of_the_other_kind_is_refused(wire: Wire, made_by: str, used_by: str) -> None:
    made = await wire.edits.Edit(edit(made_by))
    refusal = await refused(wire.edits.Edit(edit(used_by, inversion=made.inversion)))
    assert (refusal.code, refusal.reason, refusal.paths) == (INVALID, "FIELD_INVALID", ["inversion"])
    assert len(wire.engine.jobs) == 1


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        (edit_service_pb2.ComputeMaskRequest(edit=edit("edict")), "edit.method"),
        (edit_service_pb2.ComputeMaskRequest(edit=diffedit(mask=photo())), "edit.diffedit.mask"),
    ],
    ids=["another method", "a mask"],
)
async def test_a_mask_that_cannot_be_computed_is_refused(wire: Wire, request_: Any, path: str) -> None:
    refusal = await refused(wire.edits.ComputeMask(request_))
    assert (refusal.code, refusal.paths) == (INVALID, [path])
    assert wire.engine.jobs == []


@pytest.mark.parametrize("field", ["preview_every", "preview_size"])
@pytest.mark.parametrize("value", [-1, 1025])
async def test_previews_have_limits(wire: Wire, field: str, value: int) -> None:
    request = edit_service_pb2.StreamEditRequest(edit=edit(), **{field: value})
    if (field, value) == ("preview_every", 1025):
        await wire.edits.StreamEdit(request).read()
        return
    assert (await refused(wire.edits.StreamEdit(request))).paths == [field]


INVERTS = {
    "no method": (inversion_service_pb2.InvertRequest(image=photo()), ["parameters.method"]),
    "no image": (inversion_service_pb2.InvertRequest(parameters=edict(0.9)), ["image"]),
    "mixing above 1": (
        inversion_service_pb2.InvertRequest(image=photo(), parameters=edict(1.1)),
        ["parameters.edict.mixing_coefficient"],
    ),
    "unknown convention": (
        inversion_service_pb2.InvertRequest(image=photo(), parameters=parameters(ddim={"convention": 7})),
        ["parameters.ddim.convention"],
    ),
}


@pytest.mark.parametrize("case", INVERTS)
async def test_a_bad_inversion_is_refused(wire: Wire, case: str) -> None:
    request, paths = INVERTS[case]
    refusal = await refused(wire.inversions.Invert(request))
    assert (refusal.code, refusal.reason, refusal.paths) == (INVALID, "FIELD_INVALID", paths)
    nested = await refused(wire.inversions.StreamInvert(inversion_service_pb2.StreamInvertRequest(invert=request)))
    assert nested.paths == [f"invert.{path}" for path in paths]
    assert wire.engine.jobs == []


async def test_a_request_id_with_another_payload_is_refused(wire: Wire) -> None:
    request_id = str(uuid4())
    await wire.edits.Edit(edit(request_id=request_id))
    for other in (edit(request_id=request_id, seed=1), edit("sdedit", request_id=request_id)):
        refusal = await refused(wire.edits.Edit(other))
        assert (refusal.code, refusal.reason) == (INVALID, "REQUEST_ID_REUSED")
    mask = edit_service_pb2.ComputeMaskRequest(edit=edit(request_id=request_id))
    assert (await refused(wire.edits.ComputeMask(mask))).reason == "REQUEST_ID_REUSED"
    assert len(wire.engine.jobs) == 1


async def test_a_refusal_of_the_engine_reaches_the_caller_with_its_hint(wire: Wire) -> None:
    wire.engine.refusals = [QueueFull("come back", retry_after_s=0.25)]
    refusal = await refused(wire.edits.Edit(edit()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL")
    assert refusal.details["RetryInfo"].retry_delay.ToMilliseconds() == 250
    assert refusal.trailers["grpc-retry-pushback-ms"] == "250"


async def test_a_message_beyond_the_limit_of_messages_is_refused(wire: Wire) -> None:
    refusal = await refused(wire.edits.Edit(edit(image=image(bytes(25 * 1024 * 1024)))))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE")


@given(value=st.floats(width=32))
def test_no_number_out_of_range_gets_through(value: float) -> None:
    request = merged(edit("sdedit"), sdedit={"strength": value}, guidance_scale=value)
    try:
        draft = edit_draft(request, MINI, SETTINGS)
    except FieldInvalid as error:
        paths = {violation.path for violation in error.violations}
        assert paths <= {"sdedit.strength", "guidance_scale"}
        assert ("sdedit.strength" in paths) == (not 0 < value <= 1)
        assert ("guidance_scale" in paths) == (not 0 <= value <= 30)
    else:
        assert 0 < value <= 1
        assert draft.guidance_scale == pytest.approx(value, rel=1e-6)
