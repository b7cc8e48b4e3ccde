"""The program of an InvertJob, and the inversion of an edit's source."""

from dataclasses import replace

from torch import Tensor

from underpaint_server.diffusion.sampling import Guidance
from underpaint_server.jobs import Inversion, InversionOptions, Inverted, InvertJob, Photo, Result, Usage
from underpaint_server.methods.task import Editing, Inverting, inversion_grid, inverter, reconstructor
from underpaint_server.models import tensors
from underpaint_server.models.facts import Facts
from underpaint_server.programs import notices, parts
from underpaint_server.rows import Decode, Steps, named


def invert(job: InvertJob, model: Facts) -> Steps[Result]:
    """The program of an InvertJob. Raises NonFiniteLatents."""
    texts = yield from parts.embed(source_prompt=job.options.source_prompt, empty="")
    guidance = texts.guidance("source_prompt", "empty", job.options.guidance_scale)
    inversion = job.inversion
    if inversion is None:
        source = yield from parts.encode(job.source, model)
        inversion = yield from run_inverter(job.model, job.options, source, guidance, model)
    if job.verify:
        inversion = yield from _verified(inversion, job.source, guidance, model)
    arrays, grid = tensors.arrays(inversion, model), inversion_grid(job.options, model)
    found = (
        *texts.notices,
        *notices.about_unused_prompts(job),
        *notices.about_noise(grid, job.options.strength, model),
        *notices.about_exactness(job.options, arrays, inversion.reconstruction_max_abs_error),
    )
    return Inverted(replace(inversion, notices=found), Usage(), found)


def run_inverter(
    model_id: str, options: InversionOptions, source: Tensor, guidance: Guidance, model: Facts
) -> Steps[Inversion]:
    """Invert latents (c, h, w), float64. Raises NonFiniteLatents."""
    task = Inverting(source, inversion_grid(options, model), guidance, options)
    name = ("inverted", tensors.digest(source), options, guidance.name)
    arrays = yield from named(name, inverter(options.method)(task))
    tensors.check_finite(*arrays.values(), dtype=model.info.dtype)
    width, height = source.shape[2] * model.vae_scale, source.shape[1] * model.vae_scale
    return Inversion(
        model=model_id,
        model_digest=model.info.digest,
        options=options,
        width=width,
        height=height,
        batch_class=model.info.batch_class_at(width, height),
        fingerprint=model.info.fingerprint,
        arrays={name: array.cpu().numpy().copy() for name, array in arrays.items()},  # tensors may be other jobs' too
    )


def _verified(inversion: Inversion, photo: Photo, guidance: Guidance, model: Facts) -> Steps[Inversion]:
    """The inversion with its reconstruction error: the largest of the latents, and the PSNR of the pixels."""
    arrays, options = tensors.arrays(inversion, model), inversion.options
    grid = inversion_grid(options, model)
    task: Editing[None, None] = Editing(arrays, grid, guidance, _no_noise, options, None, None)
    outcome = yield from reconstructor(options.method)(task)
    tensors.check_finite(outcome.latents, dtype=model.info.dtype)
    (image,) = yield [Decode(outcome.latents)]
    return replace(
        inversion,
        reconstruction_max_abs_error=float((outcome.latents - arrays["source"]).abs().max()),
        reconstruction_psnr_db=tensors.psnr_db(tensors.picture(image), photo.pixels),
    )


def _no_noise(purpose: str, index: int) -> Tensor:
    raise AssertionError(f"a reconstruction must not use noise, but '{purpose}' {index} was requested")
