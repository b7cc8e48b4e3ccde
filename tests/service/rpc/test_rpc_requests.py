"""``resolved`` is complete: reading it again gives the same job, whatever was asked."""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.front import MINI, SETTINGS, edit, merged
from underpaint.v1 import edit_service_pb2, inversion_service_pb2, types_pb2
from underpaint_server.jobs import (
    Companion,
    DdimConvention,
    EditJob,
    Generated,
    Inversion,
    InversionOptions,
    Photo,
    Stored,
)
from underpaint_server.methods import METHODS as EDIT_METHODS
from underpaint_server.methods.ddim.options import DdimInversion
from underpaint_server.methods.edict.options import EdictInversion
from underpaint_server.rpc.requests.edit import edit_draft
from underpaint_server.rpc.requests.inversion import inversion_parameters
from underpaint_server.rpc.requests.invert import invert_draft
from underpaint_server.rpc.responses.edit import resolved as resolve
from underpaint_server.stores import inversion_digest
from underpaint_server.wire import fitting, images
from underpaint_server.wire.drafts import EditCompanion, EditDraft, EditSource, StoredSource

NAME = "0123456789abcdef" * 4
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)
SHARE = st.floats(0, 1, width=32, exclude_min=True, exclude_max=True)
GUIDANCE = st.floats(0, 30, width=32)
STEPS = st.integers(0, SETTINGS.max_steps)


def maybe(strategy: Any) -> Any:
    return st.none() | strategy


def some(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


PARAMETERS = st.builds(
    lambda **fields: some(**fields),
    steps=STEPS, strength=maybe(SHARE), guidance_scale=maybe(GUIDANCE), source_prompt=TEXT,
)  # fmt: skip
EDICT = st.builds(lambda mixing: {"edict": some(mixing_coefficient=mixing)}, maybe(SHARE))
SITES = st.lists(st.sampled_from(MINI.feature_sites), unique=True)
DDIM = st.builds(lambda c, f: {"ddim": {"convention": c, "features": f}}, st.integers(0, 2), SITES)
SOURCES = st.one_of(
    st.just({"inversion": f"inversions/{NAME}"}),
    st.just({"image": types_pb2.Image()}),
    st.builds(
        lambda prompt, seed, width, steps: {"generated": some(prompt=prompt, seed=seed, width=width, steps=steps)},
        TEXT, maybe(st.integers(0, 2**64 - 1)), st.sampled_from([0, 64, 96]), STEPS,
    ),
)  # fmt: skip
METHODS = st.one_of(
    st.just({"edict": {}}),
    st.just({"ddim": {}}),
    st.builds(lambda s, n: {"sdedit": some(strength=s, steps=n)}, maybe(SHARE), STEPS),
    st.builds(
        lambda t, n, m, r: {"diffedit": some(threshold=t, samples=n, mask_strength=m, reference_prompt=r)},
        maybe(SHARE), st.integers(0, 16), maybe(SHARE), st.just("") | TEXT,
    ),
    st.builds(
        lambda content, **fields: {"content_injection": content | some(**fields)},
        st.sampled_from([{"inversion": f"inversions/{NAME}"}, {"image": types_pb2.Image()}]),
        weight=maybe(st.floats(0, 1, width=32)), calibration=maybe(SHARE), every=STEPS, interpolation=st.integers(0, 2),
        injection_end=maybe(st.floats(0, 0.25, width=32)), boosting_start=maybe(st.floats(0, 1, width=32)), sites=SITES,
    ),
)  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> edit_service_pb2.EditRequest:
    source, method = draw(SOURCES), draw(METHODS)
    request = edit_service_pb2.EditRequest(
        **source,
        **method,
        **some(
            target_prompt=draw(st.just("") | TEXT if "content_injection" in method else TEXT),
            negative_prompt=draw(TEXT),
            seed=draw(maybe(st.integers(0, 2**64 - 1))),
            guidance_scale=draw(maybe(GUIDANCE)),
            output_media_type=draw(st.sampled_from(["", *images.MEDIA_TYPES])),
            priority=draw(st.integers(0, 3)),
        ),
    )
    kind = "edict" if "edict" in method else "ddim"
    if "image" in source and "sdedit" not in method and draw(st.booleans()):
        fields = draw(PARAMETERS) | (draw(st.just({}) | (EDICT if kind == "edict" else DDIM)))
        if "content_injection" in method and "strength" in fields:
            fields["strength"] = max(fields["strength"], 0.75)  # it must reach above where the injection ends
        request.inversion_parameters.CopyFrom(inversion_service_pb2.InversionParameters(**fields))
    return request


def job_of(draft: EditDraft, request: edit_service_pb2.EditRequest) -> tuple[EditJob, EditSource]:
    """As the server makes it, with pixels and latents that are there already."""
    edict = InversionOptions(EdictInversion(0.9), 20, 0.5, 2.5, "a dog")
    ddim = replace(edict, method=DdimInversion(DdimConvention.CURRENT))
    options = edict if type(draft.method).__name__ == "EdictEdit" else ddim
    pixels = np.zeros((48, 64, 3), np.uint8)
    match draft.source:
        case Generated() as drawn:
            start = EditSource(drawn, draft.inversion, fitting.untouched((drawn.width, drawn.height)))
        case StoredSource():
            inversion = Inversion("mini", MINI.digest, options, 64, 48, None, {})
            inverts = EDIT_METHODS[draft.method.name].inversion is not None
            start = EditSource(Stored(inversion), options if inverts else None, fitting.untouched((64, 48)), NAME)
        case _:
            start = EditSource(Photo(pixels), draft.inversion, fitting.untouched((64, 48)))
    content = request.content_injection.WhichOneof("content")
    if content is not None:
        name = NAME if content == "inversion" else ""
        start = replace(start, companion=EditCompanion(Photo(pixels), ddim, start.fitting, name))
    guidance = options.guidance_scale if draft.guidance_scale is None else draft.guidance_scale
    job = EditJob(
        "mini", start.source, start.inversion, draft.method, draft.target_prompt, draft.negative_prompt, guidance,
        draft.seed, None if start.companion is None else Companion(start.companion.source, start.companion.inversion),
    )  # fmt: skip
    return job, start


@given(request=requests())
@settings(max_examples=300)
def test_reading_a_resolved_request_gives_the_same_job(request: edit_service_pb2.EditRequest) -> None:
    first = edit_draft(request, MINI, SETTINGS)
    job, start = job_of(first, request)
    resolved = resolve(job, start, first.media_type, first.priority)
    again = edit_draft(resolved, MINI, SETTINGS)
    repeated, _ = job_of(again, resolved)
    assert replace(repeated, source=None, companion=None) == replace(job, source=None, companion=None)  # type: ignore[arg-type]
    assert (again.media_type, again.priority) == (first.media_type, first.priority)
    assert resolve(repeated, start, again.media_type, again.priority) == resolved
    if isinstance(job.source, Generated):
        assert repeated.source == job.source


@given(fields=PARAMETERS, method=EDICT | DDIM)
def test_parameters_of_an_inversion_come_back_as_they_were_used(fields: Any, method: Any) -> None:
    parameters = inversion_service_pb2.InversionParameters(**fields, **method)
    request = inversion_service_pb2.InvertRequest(image=types_pb2.Image(), parameters=parameters)
    options = invert_draft(request, MINI, SETTINGS).options
    request.parameters.CopyFrom(inversion_parameters(options))
    assert invert_draft(request, MINI, SETTINGS).options == options


def test_a_name_stands_for_pixels_function_and_options_and_nothing_else() -> None:
    pixels = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
    options = InversionOptions(EdictInversion(0.93), 20, 0.8, 3.0, "")
    name = inversion_digest(MINI, pixels, options)
    assert len(name) == 64
    assert name == inversion_digest(replace(MINI, id="renamed", dtype="whatever"), pixels.copy(), replace(options))
    others = [
        inversion_digest(replace(MINI, digest="f" * 64), pixels, options),
        inversion_digest(replace(MINI, fingerprint="0" * 64), pixels, options),
        inversion_digest(replace(MINI, batch_class=4), pixels, options),
        inversion_digest(MINI, pixels.reshape(64, 48, 3), options),
        inversion_digest(MINI, pixels + 1, options),
        inversion_digest(MINI, pixels, replace(options, method=EdictInversion(0.94))),
        inversion_digest(MINI, pixels, replace(options, method=DdimInversion())),
        inversion_digest(MINI, pixels, replace(options, method=DdimInversion(DdimConvention.CURRENT))),
        inversion_digest(MINI, pixels, replace(options, method=DdimInversion(features=("mid",)))),
        inversion_digest(MINI, pixels, replace(options, method=DdimInversion(features=("mid", "up_0")))),
        inversion_digest(MINI, pixels, replace(options, num_inference_steps=21)),
        inversion_digest(MINI, pixels, replace(options, strength=0.81)),
        inversion_digest(MINI, pixels, replace(options, guidance_scale=3.5)),
        inversion_digest(MINI, pixels, replace(options, source_prompt="a cat")),
    ]
    assert len({name, *others}) == 1 + len(others)


def test_seeds_are_drawn_anew_each_time() -> None:
    generated = edit("sdedit", generated={"prompt": "x"})
    drafts = [edit_draft(merged(generated), MINI, SETTINGS) for _ in range(3)]
    seeds = [draft.seed for draft in drafts]
    seeds += [draft.source.seed for draft in drafts if isinstance(draft.source, Generated)]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
