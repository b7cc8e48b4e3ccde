"""The program of a MaskJob: compute only the mask of an edit."""

from typing import Any

from underpaint_server.jobs import Generated, Masked, MaskJob, Photo, Result, Stored, Usage
from underpaint_server.methods.task import Context, Editing, preparation
from underpaint_server.models import tensors
from underpaint_server.models.facts import Facts
from underpaint_server.plans import source_prompt
from underpaint_server.programs import notices, parts
from underpaint_server.rows import Steps


def compute_mask(job: MaskJob, model: Facts) -> Steps[Result]:
    """The program of a MaskJob. Raises NonFiniteLatents."""
    prepare = preparation(job.method)
    assert prepare.mask is not None, "a MaskJob has a method that computes a mask"
    method_prompts = prepare.texts(job.method) if prepare.texts is not None else {}
    prompts = {"target_prompt": job.target_prompt, "source_prompt": source_prompt(job), **method_prompts}
    texts = yield from parts.embed(**prompts, empty="")
    match job.source:
        case Stored(inversion=inversion):
            source = tensors.arrays(inversion, model)["source"]
        case Generated() as generated:
            source = yield from parts.draw(generated, job.guidance_scale, texts, model)
        case Photo() as photo:
            source = yield from parts.encode(photo, model)
    task: Editing[Any, None] = Editing(
        arrays={"source": source},
        grid=(),
        guidance=texts.guidance("target_prompt", "empty", job.guidance_scale),
        noise=parts.noise(job.seed, source, model),
        inversion=job.inversion,
        options=job.method,
        extra=None,
    )
    computed = yield from prepare.mask(task, Context(job, texts.embeds, model))
    tensors.check_finite(computed.difference, dtype=model.info.dtype)
    return Masked(
        mask=tensors.mask_picture(computed.mask, model),
        difference=computed.difference.float().cpu().numpy(),
        coverage=float(computed.mask.mean()),
        usage=Usage(),
        notices=(*texts.notices, *notices.about_unused_prompts(job), *computed.notices),
    )
