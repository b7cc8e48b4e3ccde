"""Options and cost of disentangled edits (Wu, Zhao, Zhang, Yang, Jia, Zhang; CVPR 2023)."""

from dataclasses import dataclass, replace
from typing import ClassVar

from underpaint_server.jobs import Descent, EditJob, EditOptions, Generated, LearnJob, Phase, Sampler, Search
from underpaint_server.methods.base import Method
from underpaint_server.methods.cost import Plan, Stage, guided


@dataclass(frozen=True, slots=True)
class DisentangledEdit(EditOptions):
    """Mix the embeddings of two prompts, with one weight a step."""

    name: ClassVar[str] = "disentangled"

    source_prompt: str
    """What the image shows; a weight of 1 is this prompt alone."""
    weights: tuple[float, ...]
    """One a step, noisiest first, scale applied; 1 is the source prompt, 0 the target prompt, and values outside
    [0, 1] extrapolate. As many as the schedule has steps."""
    sampler: Sampler


def evaluations(steps: int, sampler: Sampler) -> int:
    """Guided predictions of one drawing of an image."""
    return steps + 1 if sampler is Sampler.PLMS else steps


def _cost(job: EditJob) -> Plan:
    options = job.method
    assert isinstance(options, DisentangledEdit)
    rows = evaluations(len(options.weights), options.sampler) * guided(job.guidance_scale)
    return (Stage(Phase.DENOISING, 1, rows),)


def _residuals_cost(job: EditJob) -> Plan:
    """What a real image's residuals cost."""
    if isinstance(job.source, Generated):
        return ()
    (drawn,) = _cost(job)
    return (replace(drawn, phase=Phase.INVERTING),)


def learning_cost(job: LearnJob) -> Plan:
    """Network rows of learning, or of a part of it."""
    options, examples = job.options, len(job.examples)
    rows = evaluations(options.num_inference_steps, options.sampler) * guided(options.guidance_scale) * examples
    # Every example is drawn or encoded once before the first candidate.
    beginning = Stage(Phase.INVERTING, 1, rows)
    match options.method:
        case Search(switch_steps=switch_steps, late_weights=late_weights):
            return beginning, Stage(Phase.OPTIMIZING, 1, len(switch_steps) * len(late_weights) * rows)
        case Descent() as method:
            done = job.state.iteration if job.state else 0
            steps = min(job.iterations, method.optimization_steps - done)
            # Forward and back over every step, and once more forward after the last.
            measuring = (Stage(Phase.DENOISING, 1, rows),) if done + steps == method.optimization_steps else ()
            return beginning, Stage(Phase.OPTIMIZING, steps, 2 * rows), *measuring


METHOD = Method(options=DisentangledEdit, cost=_cost, preparation_cost=_residuals_cost, needs_text=True)
