"""Preparation of disentangled edits: the prompts to mix, and the residuals of a source that is not generated."""

from collections.abc import Mapping

from torch import Tensor

from underpaint_server.diffusion.schedule import Grid
from underpaint_server.jobs import EditJob, Generated, Sampler
from underpaint_server.methods.disentangled.options import DisentangledEdit
from underpaint_server.methods.disentangled.steps import Mixing, anchor
from underpaint_server.methods.task import Context, Editing, Preparation
from underpaint_server.models import tensors
from underpaint_server.models.facts import Facts
from underpaint_server.rows import Steps, named


def mixing_of(
    embeds: Mapping[str, Tensor], model: Facts, steps: int, guidance_scale: float, sampler: Sampler, start: Tensor
) -> Mixing:
    """The mixing of a generated image whose noise is ``start`` (c, h, w), float64."""
    return Mixing(
        grid=model.schedule.grid(steps),
        source_embeds=embeds["source_prompt"],
        target_embeds=embeds["target_prompt"],
        negative_embeds=embeds["negative_prompt"],
        guidance_scale=guidance_scale,
        sampler=sampler,
        start=start,
        residuals=None,
    )


def _texts(options: DisentangledEdit) -> Mapping[str, str]:
    return {"source_prompt": options.source_prompt}


def _grid(options: DisentangledEdit, model: Facts) -> Grid:
    return model.schedule.grid(len(options.weights))


def _extra(task: Editing[DisentangledEdit, None], context: Context) -> Steps[Mixing]:
    """The mixing of the job. The array ``source`` is the noise of a generated source, else the encoded image."""
    job, options, source = context.job, task.options, task.arrays["source"]
    assert isinstance(job, EditJob)
    steps = len(options.weights)
    mixing = mixing_of(context.embeds, context.model, steps, job.guidance_scale, options.sampler, source)
    if isinstance(job.source, Generated):
        return mixing
    prompts = options.source_prompt, job.negative_prompt
    name = ("anchor", tensors.digest(source), job.seed, steps, options.sampler, prompts, job.guidance_scale)
    return (yield from named(name, anchor(mixing, source, task.noise)))


PREPARATION: Preparation[DisentangledEdit, Mixing] = Preparation(texts=_texts, grid=_grid, extra=_extra)
