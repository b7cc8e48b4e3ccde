"""Plans: the number of network rows of a job, by phase, before it runs.

Admission, backlog, progress and deadlines use these numbers. A contract test runs every job and compares the rows that
it yields with its plan. The cost of a method is in its folder, see ``methods``.
"""

import math

from underpaint_server.jobs import (
    EditJob,
    Generated,
    InvertJob,
    Job,
    LearnJob,
    LearnOptions,
    MaskJob,
    Phase,
    Photo,
    Stored,
)
from underpaint_server.methods import METHODS
from underpaint_server.methods.cost import Plan, Stage, drawing, inverting, reconstructing
from underpaint_server.methods.disentangled.options import learning_cost


def plan(job: Job) -> Plan:
    """The stages of a job in the order in which they run."""
    match job:
        case InvertJob():
            inversion_plan = inverting(job.options, job.options.source_prompt) if job.inversion is None else ()
            return inversion_plan + (reconstructing(job.options) if job.verify else ())
        case EditJob():
            method = METHODS[job.method.name]
            return _source(job) + method.preparation_cost(job) + method.cost(job)
        case MaskJob():
            mask_cost = METHODS[job.method.name].mask_cost
            assert mask_cost is not None, "a MaskJob has a method that computes a mask"
            return drawing(job.source, job.guidance_scale) + mask_cost(job.method)
        case LearnJob():
            return learning_cost(job)


def total_rows(job: Job) -> int:
    """Number of network rows of the whole job."""
    return sum(stage.rows for stage in plan(job))


def source_prompt(job: EditJob | MaskJob) -> str:
    """The prompt that describes the source of a job; empty if there is none."""
    if isinstance(job.source, Generated):
        return job.source.prompt
    return job.inversion.source_prompt if job.inversion is not None else ""


def image_pixels(job: Job) -> int:
    """Pixels of the image that the rows of a job are for; of a LearnJob, those of its first example."""
    source = job.examples[0] if isinstance(job, LearnJob) else job.source
    match source:
        case Photo(pixels=pixels):
            return int(pixels.shape[0] * pixels.shape[1])
        case Stored(inversion=inversion):
            return inversion.width * inversion.height
        case Generated(width=width, height=height):
            return width * height


def learning_rows(options: LearnOptions, checkpoint_every: int) -> int:
    """Number of network rows that learning takes for each example, when a job has ``checkpoint_every`` optimiser steps.

    Every job generates the examples, or computes their residuals, again.
    """
    steps = options.method.optimization_steps
    example = Generated(options.source_prompt, 0, 0, 0, options.num_inference_steps)
    whole = plan(LearnJob("", options, (example,), None, steps))
    return sum(stage.rows for stage in whole) + (math.ceil(steps / checkpoint_every) - 1) * whole[0].rows


def _source(job: EditJob) -> Plan:
    """The cost of the latents that the edit starts from, as one phase: generating the source, inverting it, and
    inverting the companion at the same time."""
    drawn = () if METHODS[job.method.name].starts_from_noise else drawing(job.source, job.guidance_scale)
    inverted = job.inversion is not None and (drawn or isinstance(job.source, Photo))
    stages = list(inverting(job.inversion, source_prompt(job))) if job.inversion is not None and inverted else []
    if drawn and stages:
        return (Stage(Phase.INVERTING, 1, sum(stage.rows for stage in (*drawn, *stages))),)
    if job.companion is not None and isinstance(job.companion.source, Photo):
        stages += inverting(job.companion.inversion, prompt="")
    if not stages:
        return drawn
    if len(stages) == 1 and job.companion is None:
        return tuple(stages)
    steps = max(stage.steps for stage in stages)
    rows = tuple(sum(stage.rows_per_step for stage in stages if k < stage.steps) for k in range(steps))
    return (Stage(Phase.INVERTING, steps, 0, rows),)
