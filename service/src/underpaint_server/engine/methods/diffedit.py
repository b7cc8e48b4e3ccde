"""Preparing DiffEdit: its mask, given or to be found; and the program of a MaskJob, which only finds one."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from underpaint_server.algorithms import diffedit
from underpaint_server.diffusion import masks
from underpaint_server.diffusion.tasks import Editing, Masking
from underpaint_server.engine import parts, pictures
from underpaint_server.engine.parts import Texts
from underpaint_server.engine.preparation import Preparation, Ready
from underpaint_server.jobs import DiffEdit, EditJob, Generated, Masked, MaskJob, Photo, Result, Stored, Usage
from underpaint_server.models.facts import Facts
from underpaint_server.plans import used_steps
from underpaint_server.rows import Steps


def find_mask(job: MaskJob, model: Facts) -> Steps[Result]:
    """The program of a MaskJob."""
    texts = yield from parts.embed(
        target_prompt=job.target_prompt,
        reference_prompt=job.method.reference_prompt,
        source_prompt=parts.source_prompt(job),
        empty="",
    )
    match job.source:
        case Stored(inversion=inversion):
            source = pictures.arrays(inversion, model)["source"]
        case Generated() as generated:
            source = yield from parts.draw(generated, job.guidance_scale, texts, model)
        case Photo() as photo:
            source = yield from parts.encode(photo, model)
    noise = parts.noise(job.seed, source, model)
    difference = yield from diffedit.difference(_masking(job, job.method, source, texts, noise, model))
    mask = masks.binarise(difference, job.method.threshold)
    return Masked(
        mask=pictures.mask_picture(mask, model),
        difference=difference.float().cpu().numpy(),
        coverage=float(mask.mean()),
        usage=Usage(),
        notices=texts.notices + diffedit.notices(mask),
    )


def _texts(options: DiffEdit) -> Mapping[str, str]:
    return {"reference_prompt": options.reference_prompt}


def _task(task: Editing, options: DiffEdit, ready: Ready) -> Steps[Editing]:
    yield from ()  # asks nothing of the network yet
    source, model = task.arrays["source"], ready.model
    mask = None if options.mask is None else pictures.latent_mask(options.mask, source, model)
    masking = _masking(ready.job, options, source, ready.texts, task.noise, model)
    return replace(task, mask=mask, masking=masking)


def _masking(
    job: EditJob | MaskJob,
    method: DiffEdit,
    source: Tensor,
    texts: Texts,
    noise: Callable[[str, int], Tensor],
    model: Facts,
) -> Masking:
    assert job.inversion is not None
    steps = job.inversion.num_inference_steps
    level = model.schedule.grid(steps)[used_steps(steps, method.mask_strength)]
    return Masking(source, level, texts["target_prompt"], texts["reference_prompt"], method.samples, noise)


PREPARATION = Preparation(starts_from_noise=False, texts=_texts, task=_task)
