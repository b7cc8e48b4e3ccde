"""The program of an EditJob: encode and invert the source, prepare the method, edit, decode."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from underpaint_server.diffusion.sampling import together
from underpaint_server.diffusion.schedule import Grid
from underpaint_server.jobs import Companion, Edited, EditJob, Generated, Inversion, Photo, Result, Stored, Usage
from underpaint_server.methods import METHODS
from underpaint_server.methods.task import (
    Context,
    Editing,
    Preparation,
    editor,
    inversion_grid,
    noise_arrays,
    preparation,
)
from underpaint_server.models import tensors
from underpaint_server.models.facts import Facts
from underpaint_server.plans import source_prompt
from underpaint_server.programs import notices, parts
from underpaint_server.programs.invert import run_inverter
from underpaint_server.programs.parts import Texts
from underpaint_server.rows import Decode, Steps

Start = tuple[dict[str, Tensor], Inversion | None]
"""Arrays to start from, and the inversion that was made for them; None where none was made."""


def edit(job: EditJob, model: Facts) -> Steps[Result]:
    """The program of an EditJob. Raises NonFiniteLatents."""
    prepare = preparation(job.method)
    texts = yield from _texts(job, prepare)
    companion_arrays = companion_inversion = None
    if job.companion is not None:
        (arrays, inversion), (companion_arrays, companion_inversion) = yield from together(
            _source(job, texts, model), _companion(job.model, job.companion, texts, model)
        )
    else:
        arrays, inversion = yield from _source(job, texts, model)
    task: Editing[Any, Any] = Editing(
        arrays=arrays,
        grid=_grid(job, prepare, model),
        guidance=texts.guidance("target_prompt", "negative_prompt", job.guidance_scale),
        noise=parts.noise(job.seed, arrays["source"], model),
        inversion=job.inversion,
        options=job.method,
        extra=None,
    )
    if prepare.extra is not None:
        context = Context(job, texts.embeds, model, companion_arrays)
        task = replace(task, extra=(yield from prepare.extra(task, context)))
    outcome = yield from editor(job.method)(task)
    tensors.check_finite(outcome.latents, dtype=model.info.dtype)
    (image,) = yield [Decode(outcome.latents)]
    mask = None if outcome.mask is None else tensors.mask_picture(outcome.mask, model)
    found = (
        *texts.notices,
        *notices.about_unused_prompts(job),
        *notices.about_noise(task.grid, _strength(job), model),
        *(notices.about_exactness(job.inversion, arrays) if job.inversion is not None else ()),
        *outcome.notices,
    )
    return Edited(tensors.picture(image), mask, inversion, Usage(), found, companion_inversion)


def _texts(job: EditJob, prepare: Preparation[Any, Any]) -> Steps[Texts]:
    prompts = {
        "target_prompt": job.target_prompt,
        "negative_prompt": job.negative_prompt,
        "source_prompt": source_prompt(job),
    }
    method_prompts = prepare.texts(job.method) if prepare.texts is not None else {}
    return parts.embed(**{**prompts, **method_prompts, "empty": ""})


def _grid(job: EditJob, prepare: Preparation[Any, Any], model: Facts) -> Grid:
    if prepare.grid is not None:
        return prepare.grid(job.method, model)
    assert job.inversion is not None
    return inversion_grid(job.inversion, model)


def _strength(job: EditJob) -> float:
    """The share of the schedule that the edit uses: that of its inversion, or the method's own, or all of it."""
    return job.inversion.strength if job.inversion is not None else getattr(job.method, "strength", 1.0)


def _source(job: EditJob, texts: Texts, model: Facts) -> Steps[Start]:
    """The arrays that the edit starts from."""
    source = job.source
    match source:
        case Stored(inversion=inversion):
            return tensors.arrays(inversion, model), None
        case Generated() if METHODS[job.method.name].starts_from_noise:
            noise = parts.start(source, model)  # needs no inversion: the source is generated from this noise
            inverts_by = METHODS[job.method.name].inversion
            return {"source": noise, **(noise_arrays(inverts_by, noise) if inverts_by is not None else {})}, None
        case Generated():
            latents = yield from parts.draw(source, job.guidance_scale, texts, model)
        case Photo():
            latents = yield from parts.encode(source, model)
    if job.inversion is None:
        return {"source": latents}, None
    guidance = texts.guidance("source_prompt", "empty", job.inversion.guidance_scale)
    inverted = yield from run_inverter(job.model, job.inversion, latents, guidance, model)
    return tensors.arrays(inverted, model), inverted if isinstance(source, Photo) else None


def _companion(model_id: str, companion: Companion, texts: Texts, model: Facts) -> Steps[Start]:
    """The companion's arrays. It is inverted without a prompt, because the source's prompt does not describe it."""
    if isinstance(companion.source, Stored):
        return tensors.arrays(companion.source.inversion, model), None
    latents = yield from parts.encode(companion.source, model)
    guidance = texts.guidance("empty", "empty", companion.inversion.guidance_scale)
    inverted = yield from run_inverter(model_id, companion.inversion, latents, guidance, model)
    return tensors.arrays(inverted, model), inverted
