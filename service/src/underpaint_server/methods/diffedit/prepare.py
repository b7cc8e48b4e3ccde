"""Preparation of DiffEdit: the mask of the request, or the task of computing one."""

from collections.abc import Mapping

from torch import Tensor

from underpaint_server.methods.cost import used_steps
from underpaint_server.methods.diffedit.options import DiffEdit
from underpaint_server.methods.diffedit.steps import Masking, compute_mask
from underpaint_server.methods.task import ComputedMask, Context, Editing, Preparation
from underpaint_server.models import tensors
from underpaint_server.rows import Steps


def _texts(options: DiffEdit) -> Mapping[str, str]:
    return {"reference_prompt": options.reference_prompt}


def _extra(task: Editing[DiffEdit, None], context: Context) -> Steps[Tensor | Masking]:
    yield from ()  # no rows: the edit itself computes the mask
    if task.options.mask is not None:
        return tensors.latent_mask(task.options.mask, task.arrays["source"], context.model)
    return _masking(task, context)


def _mask(task: Editing[DiffEdit, None], context: Context) -> Steps[ComputedMask]:
    return (yield from compute_mask(_masking(task, context), task.options.threshold))


def _masking(task: Editing[DiffEdit, None], context: Context) -> Masking:
    assert task.inversion is not None
    steps, options = task.inversion.num_inference_steps, task.options
    level = context.model.schedule.grid(steps)[used_steps(steps, options.mask_strength)]
    target, reference = context.embeds["target_prompt"], context.embeds["reference_prompt"]
    source, job = task.arrays["source"], context.job
    start = "mask", tensors.digest(source), job.seed, level
    names = (*start, job.target_prompt), (*start, options.reference_prompt)
    return Masking(source, level, target, reference, names, options.samples, task.noise)


PREPARATION: Preparation[DiffEdit, Tensor | Masking] = Preparation(texts=_texts, extra=_extra, mask=_mask)
