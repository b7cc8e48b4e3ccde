"""What arrives at the server for what was asked."""

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from underpaint import (
    AsyncClient,
    Client,
    ContentInjection,
    Convention,
    Ddim,
    DdimInversion,
    DiffEdit,
    Edict,
    EdictInversion,
    Fit,
    Generated,
    Priority,
    SdEdit,
    errors,
)
from underpaint.v1 import edit_service_pb2, inversion_service_pb2, types_pb2

EditRequest: Any = edit_service_pb2.EditRequest  # takes dictionaries for messages, which its stub does not say

METHODS = [
    (Edict(), EditRequest(edict={}), {"edict": {}}),
    (
        Edict(steps=30, strength=0.5, mixing_coefficient=0.9, inversion_guidance_scale=2.0),
        EditRequest(edict={}),
        {"edict": {"mixing_coefficient": 0.9}, "steps": 30, "strength": 0.5, "guidance_scale": 2.0},
    ),
    (
        Ddim(steps=30, convention=Convention.CURRENT),
        EditRequest(ddim={}),
        {"ddim": {"convention": "DDIM_CONVENTION_CURRENT"}, "steps": 30},
    ),
    (
        DiffEdit(threshold=0.0, samples=4, mask_strength=0.4, reference_prompt="r", strength=0.6),
        EditRequest(diffedit={"threshold": 0.0, "samples": 4, "mask_strength": 0.4, "reference_prompt": "r"}),
        {"ddim": {}, "strength": 0.6},
    ),
    (
        ContentInjection(content="inversions/00"),
        EditRequest(content_injection={"inversion": "inversions/00"}),
        {"ddim": {}},
    ),
    (
        ContentInjection(
            content=b"png",
            content_fit="pad",
            weight=0.0,
            calibration=0.5,
            region=b"grey",
            injection_end=0.0,
            every=2,
            boosting_start=0.1,
            interpolation="lerp",
            sites=["mid", "up_1"],
            strength=0.9,
            steps=30,
            convention="current",
        ),
        EditRequest(
            content_injection={
                "image": {"content": b"png", "fit": "FIT_PAD"},
                "weight": 0.0,
                "calibration": 0.5,
                "region": {"content": b"grey"},
                "injection_end": 0.0,
                "every": 2,
                "boosting_start": 0.1,
                "interpolation": "INTERPOLATION_LERP",
                "sites": ["mid", "up_1"],
            }
        ),
        {"ddim": {"convention": "DDIM_CONVENTION_CURRENT"}, "strength": 0.9, "steps": 30},
    ),
    (SdEdit(strength=0.7, steps=9), EditRequest(sdedit={"strength": 0.7, "steps": 9}), None),
]


@pytest.mark.parametrize(("method", "expected", "inversion"), METHODS)
def test_methods_arrive_as_themselves(client, server, photo, method, expected, inversion):
    client.edit(photo, "t", method)
    (request,) = server.named("Edit")
    name = expected.WhichOneof("method")
    assert request.WhichOneof("method") == name
    assert getattr(request, name) == getattr(expected, name)
    assert request.HasField("inversion_parameters") == (inversion is not None)
    assert request.inversion_parameters == inversion_service_pb2.InversionParameters(**(inversion or {}))


def test_defaults_are_left_to_the_server(client, server, photo):
    client.edit(photo, "t")
    (request,) = server.named("Edit")
    assert {field.name for field, _ in request.ListFields()} == {
        "request_id",
        "image",
        "inversion_parameters",
        "target_prompt",
        "edict",
    }
    assert request.image == types_pb2.Image(content=photo)


def test_every_argument_of_an_edit_arrives(client, server, photo):
    client.edit(
        photo,
        "after",
        source_prompt="before",
        negative_prompt="never",
        seed=0,
        guidance_scale=0.0,
        fit=Fit.PAD,
        model="mini",
        output_media_type="image/webp",
        priority=Priority.INTERACTIVE,
        request_id="6e2f9d9c-5c8f-4a0c-9b43-0d8f4f1f7a11",
    )
    (request,) = server.named("Edit")
    assert request.HasField("seed")
    assert request.HasField("guidance_scale")
    assert (request.seed, request.guidance_scale) == (0, 0.0)
    assert (request.target_prompt, request.negative_prompt) == ("after", "never")
    assert request.inversion_parameters.source_prompt == "before"
    assert (request.image.fit, request.model) == (types_pb2.FIT_PAD, "models/mini")
    assert (request.output_media_type, request.priority) == ("image/webp", types_pb2.PRIORITY_INTERACTIVE)
    assert request.request_id == "6e2f9d9c-5c8f-4a0c-9b43-0d8f4f1f7a11"


def test_every_argument_of_an_inversion_arrives(client, server, photo):
    way = DdimInversion(convention=Convention.CURRENT, features=("mid", "up_1"))
    client.invert(
        photo, method=way, source_prompt="p", steps=7, strength=0.5, guidance_scale=1.0, verify=True, fit="resize",
        priority="batch",
    )  # fmt: skip
    (request,) = server.named("Invert")
    assert request.parameters == inversion_service_pb2.InversionParameters(
        ddim=inversion_service_pb2.DdimInversion(
            convention=inversion_service_pb2.DDIM_CONVENTION_CURRENT, features=["mid", "up_1"]
        ),
        source_prompt="p",
        steps=7,
        strength=0.5,
        guidance_scale=1.0,
    )
    assert request.verify
    assert (request.image.fit, request.priority) == (types_pb2.FIT_RESIZE, types_pb2.PRIORITY_BATCH)


def test_request_ids_are_drawn_anew(client, server, photo):
    client.edit(photo, "t")
    client.edit(photo, "t")
    first, second = (request.request_id for request in server.named("Edit"))
    assert len(first) == 36
    assert first != second


def test_files_and_bytes_travel_as_they_are(client, server, tmp_path):
    jpeg = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(jpeg, "JPEG")
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg.getvalue())
    for source in (path, str(path), jpeg.getvalue()):
        client.edit(source, "t")
    assert [request.image.content for request in server.named("Edit")] == [jpeg.getvalue()] * 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16"])
def test_pillow_images_of_every_mode_travel_as_png(client, server, mode):
    client.edit(Image.new(mode, (9, 7)), "t")
    (request,) = server.named("Edit")
    arrived = Image.open(io.BytesIO(request.image.content))
    assert (arrived.format, arrived.size) == ("PNG", (9, 7))


def test_a_transparent_colour_that_a_conversion_left_behind_is_no_hindrance(client, server):
    colour, grey, palette = (Image.new(mode, (9, 7)) for mode in ("RGB", "L", "P"))
    colour.info["transparency"], grey.info["transparency"] = (0, 0, 0), 0
    palette.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow has one for a palette
        opaque = [
            colour.getchannel("R"), colour.convert("I"), grey.convert("YCbCr"), grey.convert("CMYK"),
            palette.convert("HSV"), palette.convert("1"),
        ]  # fmt: skip
    for image in opaque:
        client.edit(image, "t")
    for request in server.named("Edit"):
        assert Image.open(io.BytesIO(request.image.content)).convert("RGBA").getchannel("A").getextrema() == (255, 255)
    client.edit(colour, "t")
    assert Image.open(io.BytesIO(server.named("Edit")[-1].image.content)).info["transparency"] == (0, 0, 0)


def test_a_pillow_image_that_says_no_range_of_values_is_refused_before_it_is_sent(client, server):
    for image in (Image.new("F", (9, 7), 0.5), Image.new("I", (9, 7), 70_000)):
        with pytest.raises(ValueError, match="scale"):
            client.edit(image, "t")
    assert server.requests == []


def test_orientation_of_a_pillow_image_is_applied_before_it_is_lost(client, server, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    Image.new("RGB", (9, 7), "red").save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as turned:
        client.edit(turned, "t")
    (request,) = server.named("Edit")
    assert Image.open(io.BytesIO(request.image.content)).size == (7, 9)


def test_generated_sources_carry_their_own_settings(client, server):
    client.edit(Generated("a cat", seed=0, width=64, height=72, steps=12), "a dog", Ddim())
    (request,) = server.named("Edit")
    expected = edit_service_pb2.GeneratedSource(prompt="a cat", seed=0, width=64, height=72, steps=12)
    assert request.generated == expected
    assert request.generated.HasField("seed")
    assert not request.HasField("inversion_parameters")


def test_generate_draws_the_prompt_it_is_given(client, server):
    client.generate("a cat", seed=5, steps=3, guidance_scale=2.0)
    (request,) = server.named("Edit")
    assert request.generated == edit_service_pb2.GeneratedSource(prompt="a cat", seed=5, steps=3)
    assert (request.target_prompt, request.WhichOneof("method"), request.guidance_scale) == ("a cat", "ddim", 2.0)


def test_an_inversion_can_be_named_in_three_ways(client, server, photo):
    inversion = client.invert(photo)
    looked_up = client.get_inversion(inversion.name.removeprefix("inversions/"))
    for source in (inversion, looked_up, inversion.name):
        client.edit(source, "t")
    assert {request.inversion for request in server.named("Edit")} == {inversion.name}


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("inversions/00", {"source_prompt": "p"}),
        ("inversions/00", {"method": Edict(steps=3)}),
        ("inversions/00", {"method": Edict(mixing_coefficient=0.5)}),
        (Generated("a"), {"method": Ddim(convention=Convention.TARGET)}),
        (Generated("a"), {"method": DiffEdit(strength=0.5)}),
        (Generated("a"), {"fit": "crop"}),
        (Generated("a"), {"method": ContentInjection(content=b"png", steps=5)}),
        (b"png", {"method": ContentInjection(content="inversions/00", content_fit="crop")}),
        (b"png", {"method": ContentInjection(content=b"png", interpolation="nlerp")}),
        ("inversions/00", {"fit": "crop"}),
        (b"png", {"fit": "stretch"}),
        (b"png", {"priority": "urgent"}),
        (b"png", {"preview_every": 3}),
        (b"png", {"preview_every": 0, "on_preview": print}),
    ],
)
def test_contradictions_are_refused_before_anything_is_sent(client, server, source, options):
    with pytest.raises(ValueError, match=r"leave it out|leave them out|needs on_preview|must be|choose one of"):
        client.edit(source, "t", **options)
    assert server.requests == []


@pytest.mark.parametrize(
    ("source", "method"), [(3, Edict()), (None, Edict()), (b"png", EdictInversion()), (b"png", "edict")]
)
def test_things_of_another_kind_are_refused(client, server, source, method):
    with pytest.raises(TypeError):
        client.edit(source, "t", method)
    assert server.requests == []


@pytest.mark.parametrize(
    ("source", "method", "options", "says"),
    [
        (b"x", SdEdit(), {"seed": -1}, "seed is -1: it must be 0 to 18446744073709551615"),
        (b"x", SdEdit(), {"seed": 2**64}, "seed is 18446744073709551616"),
        (b"x", SdEdit(steps=2**31), {}, "steps is 2147483648: it must be 0 to 2147483647"),
        (b"x", Edict(steps=-(2**40)), {}, "steps is -1099511627776"),
        (b"x", DiffEdit(samples=2**31), {}, "samples is 2147483648"),
        (Generated("t", seed=-5), Edict(), {}, "seed is -5"),
        (Generated("t", width=2**31), Edict(), {}, "width is 2147483648"),
    ],
)
def test_a_number_that_no_field_holds_is_refused_by_its_name(client, server, source, method, options, says):
    with pytest.raises(ValueError, match=says):
        client.edit(source, "t", method, **options)
    assert server.requests == []


def test_a_missing_file_is_the_callers_own_error(client, tmp_path):
    with pytest.raises(FileNotFoundError):
        client.edit(Path(tmp_path / "absent.png"), "t")


def test_a_picture_over_a_known_limit_is_not_uploaded(client, server, photo):
    large = photo + bytes(5000)
    client.edit(large, "t")  # limits are not known yet: the server decides
    client.models()
    for call in (client.edit, client.compute_mask):
        with pytest.raises(errors.ImageTooLarge) as caught:
            call(large, "t", DiffEdit())
        assert caught.value.metadata == {"unit": "bytes", "limit": "5000", "actual": str(len(large))}
    with pytest.raises(errors.ImageTooLarge):
        client.invert(large, model="mini")
    client.invert(large, model="unheard-of")
    assert [name for name, _ in server.requests if name in ("Edit", "Invert", "ComputeMask")] == ["Edit", "Invert"]


def test_content_may_be_a_picture_a_file_or_an_inversion_and_needs_no_prompt(client, server, photo, tmp_path):
    (tmp_path / "content.png").write_bytes(photo)
    made = client.invert(photo, method=DdimInversion(features=["mid"]))
    for content in (photo, tmp_path / "content.png", Image.new("RGB", (9, 7)), made, made.name):
        client.edit(photo, method=ContentInjection(content=content))
    requests = server.named("Edit")
    assert [r.content_injection.WhichOneof("content") for r in requests] == ["image"] * 3 + ["inversion"] * 2
    assert {r.content_injection.inversion for r in requests[3:]} == {made.name}
    assert {r.target_prompt for r in requests} == {""}


def test_a_mask_of_ones_own_is_sent(client, server, photo):
    mask = Image.new("L", (8, 8), 255)
    client.edit(photo, "t", DiffEdit(mask=mask))
    (request,) = server.named("Edit")
    assert Image.open(io.BytesIO(request.diffedit.mask.content)).mode == "L"


def test_metadata_goes_with_every_call(connect, server, photo):
    client = connect(server.target, metadata={"authorization": "Bearer t"})
    client.edit(photo, "t")
    client.models()
    assert {sent["authorization"] for sent in server.metadata} == {"Bearer t"}


def test_names_of_metadata_may_have_capitals(connect, server, photo):
    connect(server.target, metadata={"Authorization": "Bearer t"}).edit(photo, "t")
    assert {sent["authorization"] for sent in server.metadata} == {"Bearer t"}


@pytest.mark.parametrize(
    "metadata", [{"authorization": "secret\n"}, {"authorization": "secr\xe9t"}, {"a b": "c"}, {"": "c"}]
)
def test_metadata_that_cannot_be_sent_is_refused_by_name(kind, server, metadata):
    (name,) = metadata
    with pytest.raises(ValueError, match=f"metadata: .*{name!r}") as told:
        {"sync": Client, "async": AsyncClient}[kind](server.target, metadata=metadata)
    assert "secr" not in str(told.value)
