"""Options and cost of disentangled edits (Wu, Zhao, Zhang, Yang, Jia, Zhang; CVPR 2023)."""

from dataclasses import dataclass, replace
from typing import ClassVar

from underpaint_server.jobs import Descent, EditJob, EditOptions, Generated, LearnJob, Phase, Sampler, Search
from underpaint_server.methods.base import Method
from underpaint_server.methods.cost import Plan, Stage, guided


@dataclass(frozen=True, slots=True)
class DisentangledEdit(EditOptions):
    """Options of a disentangled edit: mix the embeddings of two prompts, with one weight per step."""

    name: ClassVar[str] = "disentangled"

    source_prompt: str
    """Describes the image; a weight of 1 is this prompt alone."""
    weights: tuple[float, ...]
    """One per step of the schedule, noisiest first, with ``scale`` applied. 1 is the source prompt, 0 the target
    prompt; values outside [0, 1] extrapolate."""
    sampler: Sampler


def step_weights(steps: int, switch_step: int, late_weight: float) -> tuple[float, ...]:
    """``steps`` weights: 1 for the first ``switch_step``, ``late_weight`` for the others."""
    return (1.0,) * switch_step + (late_weight,) * (steps - switch_step)


def evaluations(steps: int, sampler: Sampler) -> int:
    """Number of guided predictions of sampling one image."""
    return steps + 1 if sampler is Sampler.PLMS else steps


def _cost(job: EditJob) -> Plan:
    options = job.method
    assert isinstance(options, DisentangledEdit)
    rows = evaluations(len(options.weights), options.sampler) * guided(job.guidance_scale)
    return (Stage(Phase.DENOISING, 1, rows),)


def _residuals_cost(job: EditJob) -> Plan:
    """The plan of computing the residuals; empty for a generated source."""
    if isinstance(job.source, Generated):
        return ()
    (drawn,) = _cost(job)
    return (replace(drawn, phase=Phase.INVERTING),)


def learning_cost(job: LearnJob) -> Plan:
    """The plan of a LearnJob."""
    options, examples = job.options, len(job.examples)
    rows = evaluations(options.num_inference_steps, options.sampler) * guided(options.guidance_scale) * examples
    # Before learning, every example is generated once, or its residuals are computed.
    references = Stage(Phase.INVERTING, 1, rows)
    match options.method:
        case Search(switch_steps=switch_steps, late_weights=late_weights):
            return references, Stage(Phase.OPTIMIZING, 1, len(switch_steps) * len(late_weights) * rows)
        case Descent() as method:
            done = job.state.iteration if job.state else 0
            steps = min(job.iterations, method.optimization_steps - done)
            # An optimiser step samples forward and goes back; the final weights are sampled once more.
            measuring = (Stage(Phase.DENOISING, 1, rows),) if done + steps == method.optimization_steps else ()
            return references, Stage(Phase.OPTIMIZING, steps, 2 * rows), *measuring


METHOD = Method(options=DisentangledEdit, cost=_cost, preparation_cost=_residuals_cost, needs_text=True)
