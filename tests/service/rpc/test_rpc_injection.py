"""Content injection over a socket: content and source held against each other, both kept, and the answer repeatable."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from support.front import MINI, SETTINGS, SILENT, Wire, edit, encoded, merged, photo, refused
from underpaint.v1 import edit_service_pb2, inversion_service_pb2, types_pb2
from underpaint_server.errors import FieldInvalid
from underpaint_server.jobs import DdimConvention, Generated, Interpolation, InversionOptions, Photo, Stored
from underpaint_server.methods.content_injection.options import ContentInjection
from underpaint_server.methods.ddim.options import DdimInversion
from underpaint_server.rpc.requests.edit import edit_draft
from underpaint_server.rpc.requests.invert import invert_draft

OTHER = photo(seed=7)


def inject(*, target_prompt: str = "", content: Any = None, **fields: Any) -> edit_service_pb2.EditRequest:
    """A good request: two photos, no text."""
    settings = {"image": OTHER} if content is None else content
    settings |= fields.pop("settings", {})
    request = edit("content_injection", content_injection=settings, **fields)
    request.target_prompt = target_prompt
    return request


async def invert(wire: Wire, image: types_pb2.Image, *features: str, **fields: Any) -> str:
    parameters = merged(inversion_service_pb2.InversionParameters(), ddim={"features": features}, strength=1, **fields)
    answer = await wire.inversions.Invert(inversion_service_pb2.InvertRequest(image=image, parameters=parameters))
    return str(answer.inversion.name)


async def test_every_default_is_filled_in(wire: Wire) -> None:
    await wire.edits.Edit(inject())
    (job,) = wire.engine.jobs
    assert job.inversion == InversionOptions(DdimInversion(), 20, 1.0, 1.0, "")
    assert job.method == ContentInjection(0.3, 0.0, None, 0.4, 1, 0.0, Interpolation.SLERP, ("mid",))
    assert (job.target_prompt, job.guidance_scale) == ("", 1.0)
    assert isinstance(job.companion.source, Photo)
    assert job.companion.inversion == replace(job.inversion, method=DdimInversion(features=("mid",)))


async def test_content_goes_along_the_sources_schedule_without_its_text(wire: Wire) -> None:
    parameters = merged(
        inversion_service_pb2.InversionParameters(),
        steps=10,
        strength=0.7,
        guidance_scale=3,
        source_prompt="a cat",
        ddim={"convention": 2},
    )
    settings = {"sites": ["up_1", "mid"], "interpolation": 2, "every": 3, "boosting_start": 0.2, "calibration": 0.3}
    await wire.edits.Edit(inject(inversion_parameters=parameters, settings=settings))
    (job,) = wire.engine.jobs
    way = DdimInversion(DdimConvention.CURRENT, ("mid", "up_1"))
    assert job.companion.inversion == InversionOptions(way, 10, 0.7, 1.0, "")
    assert job.method == ContentInjection(0.3, 0.3, None, 0.4, 3, 0.2, Interpolation.LERP, ("mid", "up_1"))


@pytest.mark.parametrize("source", ["image", "inversion", "generated"])
@pytest.mark.parametrize("content", ["image", "inversion"])
async def test_the_resolved_request_gives_the_same_bytes(wire: Wire, source: str, content: str) -> None:
    sources: dict[str, Callable[[], Any]] = {
        "image": lambda: photo((200, 100)),
        "generated": lambda: edit_service_pb2.GeneratedSource(prompt="a cat", width=64, height=48),
    }
    given = await invert(wire, photo()) if source == "inversion" else sources[source]()
    whose = {"inversion": await invert(wire, OTHER, "mid")} if content == "inversion" else None
    region = types_pb2.Image(content=encoded(Image.linear_gradient("L").resize((64, 48))))
    request = inject(**{source: given}, content=whose, settings={"region": region, "weight": 0.7})
    first = await wire.edits.Edit(request)
    again = await wire.edits.Edit(first.resolved)
    assert again.image.content == first.image.content
    assert again.resolved == first.resolved
    assert first.resolved.content_injection.WhichOneof("content") == "inversion", "it is stored by now"
    jobs = wire.engine.jobs[-2:]
    assert isinstance(jobs[1].companion.source, Stored)
    np.testing.assert_array_equal(jobs[0].method.region, jobs[1].method.region)


async def test_the_second_injection_of_a_content_inverts_it_no_more(wire: Wire) -> None:
    await wire.edits.Edit(inject())
    await wire.edits.Edit(inject(image=photo(seed=3), settings={"weight": 0.9}))
    first, second = wire.engine.jobs
    assert (type(first.companion.source), type(second.companion.source)) == (Photo, Stored)
    assert second.companion.source.inversion.arrays.keys() == {"h_mid"}, "the rest need not travel"
    await wire.edits.Edit(inject(settings={"sites": ["mid", "up_0"]}))
    assert isinstance(wire.engine.jobs[2].companion.source, Photo), "other features are another inversion"


async def test_a_drawn_sources_own_text_is_the_target_unless_there_is_another(wire: Wire) -> None:
    drawn = edit_service_pb2.GeneratedSource(prompt="a cat")
    await wire.edits.Edit(inject(generated=drawn))
    await wire.edits.Edit(inject(generated=drawn, target_prompt="a dog"))
    assert [job.target_prompt for job in wire.engine.jobs] == ["a cat", "a dog"]
    assert isinstance(wire.engine.jobs[0].source, Generated)


async def test_content_is_fitted_to_the_size_of_the_source(wire: Wire) -> None:
    wide = photo((300, 100))
    wide.fit = types_pb2.FIT_RESIZE
    for fit in (types_pb2.FIT_CROP, types_pb2.FIT_PAD):
        content = types_pb2.Image(content=OTHER.content, fit=fit)
        await wire.edits.Edit(inject(image=wide, content={"image": content}))
        job = wire.engine.jobs[-1]
        source = job.source.pixels if isinstance(job.source, Photo) else None
        assert source is None or source.shape == (32, 96, 3)
        assert job.companion.source.pixels.shape == (32, 96, 3)
    content.fit = types_pb2.FIT_RESIZE
    refusal = await refused(wire.edits.Edit(inject(image=wide, content={"image": content})))
    assert refusal.paths == ["content_injection.image.fit"]
    assert "96x32" in refusal.message


async def test_where_the_store_is_full_the_resolved_request_keeps_the_pixels(wire: Wire) -> None:
    wire.context.stores.inversions._max_entry_bytes = 1000  # takes no inversion at all
    first = await wire.edits.Edit(inject())
    assert first.resolved.content_injection.WhichOneof("content") == "image"
    again = await wire.edits.Edit(first.resolved)
    assert again.image.content == first.image.content
    assert again.resolved == first.resolved


@pytest.mark.parametrize(
    ("features", "size", "says"),
    [
        ((), (64, 48), "ddim.features mid"),
        (("up_0",), (64, 48), "ddim.features mid"),
        (("mid",), (300, 100), "96x32"),
    ],
)
async def test_a_stored_content_that_does_not_go_with_the_source(
    wire: Wire, features: tuple[str, ...], size: tuple[int, int], says: str
) -> None:
    image = photo(size)
    image.fit = types_pb2.FIT_RESIZE
    name = await invert(wire, image, *features)
    refusal = await refused(wire.edits.Edit(inject(content={"inversion": name})))
    assert (refusal.reason, refusal.paths) == ("FIELD_INVALID", ["content_injection.inversion"])
    assert says in refusal.message
    assert "image" in refusal.message
    assert len(wire.engine.jobs) == 1


async def test_content_of_edict_or_of_other_weights_or_of_nobody_is_refused(wire: Wire) -> None:
    made = await wire.edits.Edit(edit("edict"))
    refusal = await refused(wire.edits.Edit(inject(content={"inversion": made.inversion})))
    assert refusal.paths == ["content_injection.inversion"]
    name = await invert(wire, OTHER, "mid")
    wire.engine.models = {"mini": replace(MINI, digest="0" * 64), "other": MINI}
    refusal = await refused(wire.edits.Edit(inject(content={"inversion": name})))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "INVERSION_MODEL_MISMATCH")
    gone = "inversions/" + "a" * 64
    refusal = await refused(wire.edits.Edit(inject(content={"inversion": gone})))
    assert (refusal.reason, refusal.details["ResourceInfo"].resource_name) == ("INVERSION_EXPIRED", gone)


async def test_an_injection_that_would_end_before_it_begins_is_refused(wire: Wire) -> None:
    low = inversion_service_pb2.InversionParameters(strength=0.4)
    refusal = await refused(wire.edits.Edit(inject(inversion_parameters=low)))
    assert refusal.paths == ["content_injection.injection_end"]
    parameters = merged(inversion_service_pb2.InversionParameters(), ddim={}, strength=0.3)
    request = inversion_service_pb2.InvertRequest(image=photo(), parameters=parameters)
    name = (await wire.inversions.Invert(request)).inversion.name
    refusal = await refused(wire.edits.Edit(inject(inversion=name)))
    assert refusal.paths == ["content_injection.injection_end"]
    await wire.edits.Edit(inject(inversion=name, settings={"injection_end": 0.2}))


NAN = float("nan")
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "numbers": (
        {"weight": 1.1, "calibration": -0.1, "injection_end": NAN, "boosting_start": 2, "every": -1},
        ["weight", "calibration", "injection_end", "every", "boosting_start"],
    ),
    "NaN": ({"weight": NAN, "calibration": NAN, "boosting_start": NAN}, ["weight", "calibration", "boosting_start"]),
    "too far apart": ({"every": 51}, ["every"]),
    "end": ({"injection_end": 1.0}, ["injection_end"]),
    "interpolation": ({"interpolation": 9}, ["interpolation"]),
    "unknown site": ({"sites": ["mid", "down_3"]}, ["sites"]),
    "site twice": ({"sites": ["mid", "mid"]}, ["sites"]),
    "content's fit": ({"image": types_pb2.Image(content=OTHER.content, fit=9)}, ["image.fit"]),  # type: ignore[arg-type]
    "content's name": ({"inversion": "mine", "weight": 2}, ["weight", "inversion"]),
}


@pytest.mark.parametrize("case", WRONG)
async def test_wrong_settings_are_all_named(wire: Wire, case: str) -> None:
    settings, paths = WRONG[case]
    content: dict[str, Any] | None = {} if {"image", "inversion"} & settings.keys() else None
    refusal = await refused(wire.edits.Edit(inject(content=content, settings=settings)))
    assert refusal.paths == [f"content_injection.{path}" for path in paths]
    assert wire.engine.jobs == []


async def test_no_content_and_a_wrong_region_are_refused(wire: Wire) -> None:
    refusal = await refused(wire.edits.Edit(inject(content={})))
    assert refusal.paths == ["content_injection.content"]
    region = types_pb2.Image(content=encoded(Image.new("L", (63, 48))))
    refusal = await refused(wire.edits.Edit(inject(settings={"region": region})))
    assert refusal.paths == ["content_injection.region"]
    refusal = await refused(wire.edits.Edit(inject(content={"image": types_pb2.Image(content=b"x")})))
    assert refusal.reason == "IMAGE_UNDECODABLE"
    edict = merged(inversion_service_pb2.InversionParameters(), edict={})
    refusal = await refused(wire.edits.Edit(inject(inversion_parameters=edict)))
    assert refusal.paths == ["inversion_parameters.method"]
    assert wire.engine.jobs == []


async def test_features_of_an_inversion_are_sites_of_the_model(wire: Wire) -> None:
    name = await invert(wire, OTHER, "up_0", "mid")
    assert name == await invert(wire, OTHER, "mid", "up_0"), "their order makes no difference"
    assert name != await invert(wire, OTHER)
    answer = await wire.inversions.GetInversion(inversion_service_pb2.GetInversionRequest(name=name))
    assert answer.inversion.parameters.ddim.features == ["mid", "up_0"]
    parameters = merged(inversion_service_pb2.InversionParameters(), ddim={"features": ["nose"]})
    request = inversion_service_pb2.InvertRequest(image=OTHER, parameters=parameters)
    refusal = await refused(wire.inversions.Invert(request))
    assert refusal.paths == ["parameters.ddim.features"]
    assert "mid, up_0, up_1" in refusal.message
    del parameters.ddim.features[:]
    parameters.ddim.features.extend(f"nose{number}" for number in range(5000))
    request = inversion_service_pb2.InvertRequest(image=OTHER, parameters=parameters)
    assert len((await refused(wire.inversions.Invert(request))).message) < 300, "no long answer to a wrong question"


# --- models that read no text ------------------------------------------------------------------------------------


def paths_of(request: edit_service_pb2.EditRequest) -> list[str]:
    with pytest.raises(FieldInvalid) as caught:
        edit_draft(request, SILENT, SETTINGS)
    assert "models/mini" in str(caught.value)
    return [violation.path for violation in caught.value.violations]


@pytest.mark.parametrize("method", ["sdedit", "ddim", "edict", "content_injection"])
def test_without_text_every_edit_is_free_of_it(method: str) -> None:
    request = inject() if method == "content_injection" else edit(method)
    request.target_prompt = ""
    draft = edit_draft(request, SILENT, SETTINGS)
    assert draft.guidance_scale == 1.0 if draft.inversion is None else draft.inversion.guidance_scale == 1.0
    request.target_prompt = request.negative_prompt = "a cat"
    request.guidance_scale = 3
    assert paths_of(request) == ["target_prompt", "negative_prompt", "guidance_scale"]


def test_without_text_inversions_and_drawn_sources_are_free_of_it_too() -> None:
    request = edit("ddim", generated={"prompt": "a cat"})
    assert paths_of(request) == ["generated.prompt", "target_prompt"]
    assert paths_of(edit("diffedit", image=photo()))[0] == "method"
    parameters = merged(inversion_service_pb2.InversionParameters(), edict={}, source_prompt="a cat", guidance_scale=3)
    message = inversion_service_pb2.InvertRequest(image=OTHER, parameters=parameters)
    with pytest.raises(FieldInvalid) as caught:
        invert_draft(message, SILENT, SETTINGS)
    assert [v.path for v in caught.value.violations] == ["parameters.guidance_scale", "parameters.source_prompt"]
    message.parameters.ClearField("source_prompt")
    message.parameters.guidance_scale = 1
    assert invert_draft(message, SILENT, SETTINGS).options.guidance_scale == 1.0
