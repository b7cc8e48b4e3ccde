"""Preparing disentangled edits: two texts mixed, and a real picture's residuals."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from underpaint_server.algorithms import disentangle
from underpaint_server.diffusion.schedule import Grid
from underpaint_server.diffusion.tasks import Editing, Mixing
from underpaint_server.engine.parts import Texts
from underpaint_server.engine.preparation import Preparation, Ready
from underpaint_server.jobs import DisentangledEdit, Generated, Sampler
from underpaint_server.models.facts import Facts
from underpaint_server.rows import Steps


def mixing_of(texts: Texts, model: Facts, steps: int, guidance_scale: float, sampler: Sampler, start: Tensor) -> Mixing:
    """The mixing of a picture that the model draws from ``start`` (c, h, w)."""
    return Mixing(
        grid=model.schedule.grid(steps),
        source_embeds=texts["source_prompt"],
        target_embeds=texts["target_prompt"],
        negative_embeds=texts["negative_prompt"],
        guidance_scale=guidance_scale,
        sampler=sampler,
        start=start,
        residuals=None,
    )


def anchored(mixing: Mixing, source: Tensor, steps: int, noise: Callable[[str, int], Tensor]) -> Steps[Mixing]:
    """The same mixing, of a real picture: a weight of 1 leads back to ``source`` (c, h, w)."""
    return (yield from disentangle.anchor(mixing, source, [noise("anchor", i) for i in range(steps)]))


def _texts(options: DisentangledEdit) -> Mapping[str, str]:
    return {"source_prompt": options.source_prompt}


def _grid(options: DisentangledEdit, model: Facts) -> Grid:
    return model.schedule.grid(len(options.weights))


def _task(task: Editing, options: DisentangledEdit, ready: Ready) -> Steps[Editing]:
    """``source`` is the start where the model draws the picture, else the picture itself."""
    steps, source, job = len(options.weights), task.arrays["source"], ready.job
    mixing = mixing_of(ready.texts, ready.model, steps, job.guidance_scale, options.sampler, source)
    if not isinstance(job.source, Generated):
        mixing = yield from anchored(mixing, source, steps, task.noise)
    return replace(task, mixing=mixing)


PREPARATION = Preparation(texts=_texts, grid=_grid, task=_task)
