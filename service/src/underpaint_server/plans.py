"""How many network rows a job will ask for, by phase: plain arithmetic, known before anything runs.

Admission, backlog, progress and deadlines all count with these numbers. A contract test runs every algorithm and
holds the rows it yields against its plan. ``n`` is the number of used steps, guidance doubles a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from underpaint_server.jobs import (
    ContentInjection,
    DdimEdit,
    Descent,
    DiffEdit,
    DisentangledEdit,
    EdictEdit,
    EdictInversion,
    EditJob,
    Generated,
    InversionOptions,
    InvertJob,
    Job,
    LearnJob,
    MaskJob,
    Phase,
    Photo,
    Sampler,
    SdEdit,
    Search,
)


@dataclass(frozen=True, slots=True)
class Stage:
    """One phase of a job: ``steps`` steps of ``rows_per_step`` network rows each."""

    phase: Phase
    steps: int
    rows_per_step: int
    extra: tuple[int, ...] = ()
    """Rows beyond those, of each step; empty where all steps cost the same."""

    @property
    def rows(self) -> int:
        """Network rows of the whole stage."""
        return self.steps * self.rows_per_step + sum(self.extra)

    def steps_in(self, rows: int) -> int:
        """Steps that are finished after so many rows of this stage."""
        if not self.extra:
            return rows // self.rows_per_step
        ends = accumulate(self.rows_per_step + more for more in self.extra)
        return sum(end <= rows for end in ends)


Plan = tuple[Stage, ...]


def used_steps(num_inference_steps: int, strength: float) -> int:
    """Steps of the schedule that a strength uses, at least one: ``int(S * strength)`` as in EDICT's code."""
    return max(1, round_down(num_inference_steps * strength))


def plan(job: Job) -> Plan:
    """The stages of a job in the order they run; a phase may appear once only."""
    match job:
        case InvertJob():
            inverting = _invert(job.options) if job.inversion is None else ()
            return inverting + (_regenerate(job.options, job.options.guidance_scale) if job.verify else ())
        case EditJob():
            costs = _METHODS[type(job.method)]
            return costs.source(job) + costs.edit(job)
        case MaskJob():
            return _drawing(job.source, job.guidance_scale) + _mask(job.method)
        case LearnJob():
            return _learn(job)


def total_rows(job: Job) -> int:
    """Network rows of the whole job."""
    return sum(stage.rows for stage in plan(job))


def guided(guidance_scale: float) -> int:
    """Rows of one guided prediction."""
    return 1 if guidance_scale == 1.0 else 2


def injected_steps(method: ContentInjection, options: InversionOptions) -> range:
    """Which of the used steps take content, as their numbers n .. 1 from the noisiest; ``options`` are the source's.

    Counted in steps and never by comparing timesteps: two grids that meet in a few timesteps only, by chance of their
    divisors, would inject in those few only.
    """
    plain = round_down(options.num_inference_steps * method.injection_end)
    return range(used_steps(options.num_inference_steps, options.strength), plain, -method.every)


def boosted_steps(method: ContentInjection, options: InversionOptions) -> int:
    """How many of the least noisy steps add fresh noise."""
    return round_down(options.num_inference_steps * method.boosting_start)


def round_down(steps: float) -> int:
    """Whole steps in a share of them; 0.7 * 50 is 35 also when 0.7 arrived as a float32."""
    return int(steps + 1e-5)


def _invert(options: InversionOptions) -> Plan:
    n = used_steps(options.num_inference_steps, options.strength)
    each = guided(options.guidance_scale) * (2 if isinstance(options.method, EdictInversion) else 1)
    return (Stage(Phase.INVERTING, n, each),)


def _regenerate(options: InversionOptions, guidance_scale: float) -> Plan:
    n = used_steps(options.num_inference_steps, options.strength)
    each = guided(guidance_scale) * (2 if isinstance(options.method, EdictInversion) else 1)
    return (Stage(Phase.DENOISING, n, each),)


def _drawing(source: object, guidance_scale: float) -> Plan:
    if not isinstance(source, Generated):
        return ()
    return (Stage(Phase.INVERTING, source.num_inference_steps, guided(guidance_scale)),)


# --- from the source to latents -------------------------------------------------------------------------------------


def _encoded(job: EditJob) -> Plan:
    """A photo is inverted; a drawing starts from the noise that it is drawn from."""
    return _invert(job.inversion) if isinstance(job.source, Photo) and job.inversion is not None else ()


def _drawn(job: EditJob) -> Plan:
    """A drawing is drawn first."""
    return _drawing(job.source, job.guidance_scale) or _encoded(job)


def _drawn_and_encoded(job: EditJob) -> Plan:
    """A drawing is drawn, and then inverted as a photo is: one phase."""
    drawing = _drawing(job.source, job.guidance_scale)
    if not drawing or job.inversion is None:
        return drawing or _encoded(job)
    (drawn,), (encoded,) = drawing, _invert(job.inversion)
    return (Stage(Phase.INVERTING, 1, drawn.rows + encoded.rows),)


def _anchored(job: EditJob) -> Plan:
    """What a real picture's residuals cost."""
    if isinstance(job.source, Generated):
        return ()
    (drawn,) = _disentangled(job)
    return (replace(drawn, phase=Phase.INVERTING),)


def _source_and_content(job: EditJob) -> Plan:
    """Both inversions run in lockstep: one phase, as long as the longer one."""
    assert job.content is not None
    ways = [(job.source, job.inversion), (job.content.source, job.content.inversion)]
    stages = [_invert(options)[0] for source, options in ways if isinstance(source, Photo) and options is not None]
    if not stages:
        return ()
    steps = max(stage.steps for stage in stages)
    extra = tuple(sum(s.rows_per_step for s in stages if k < s.steps) for k in range(steps))
    return (Stage(Phase.INVERTING, steps, 0, extra),)


# --- the edit itself ------------------------------------------------------------------------------------------------


def _inject(job: EditJob) -> Plan:
    """A plain prediction a step; where content is injected a mapped one too, and a calibrated one if that is on."""
    method = job.method
    assert isinstance(method, ContentInjection)
    assert job.inversion is not None
    n = used_steps(job.inversion.num_inference_steps, job.inversion.strength)
    each, injected = guided(job.guidance_scale), injected_steps(method, job.inversion)
    more = each * (2 if method.calibration else 1)
    return (Stage(Phase.DENOISING, n, each, tuple(more if k in injected else 0 for k in range(n, 0, -1))),)


def _from_latents(job: EditJob) -> Plan:
    if isinstance(job.source, Generated):
        rows = guided(job.guidance_scale) * (2 if isinstance(job.method, EdictEdit) else 1)
        return (Stage(Phase.DENOISING, job.source.num_inference_steps, rows),)
    assert job.inversion is not None
    return _regenerate(job.inversion, job.guidance_scale)


def _masked(job: EditJob) -> Plan:
    method = job.method
    assert isinstance(method, DiffEdit)
    assert job.inversion is not None
    masking = _mask(method) if method.mask is None else ()
    return masking + _regenerate(job.inversion, job.guidance_scale)


def _noised(job: EditJob) -> Plan:
    method = job.method
    assert isinstance(method, SdEdit)
    steps = used_steps(method.num_inference_steps, method.strength)
    return (Stage(Phase.DENOISING, steps, guided(job.guidance_scale)),)


def _disentangled(job: EditJob) -> Plan:
    method = job.method
    assert isinstance(method, DisentangledEdit)
    rows = evaluations(len(method.weights), method.sampler) * guided(job.guidance_scale)
    return (Stage(Phase.DENOISING, 1, rows),)


@dataclass(frozen=True, slots=True)
class _Costs:
    """The stages of one method, before its edit and of it."""

    source: Callable[[EditJob], Plan]
    edit: Callable[[EditJob], Plan]


_METHODS: Mapping[type, _Costs] = {
    SdEdit: _Costs(_drawn, _noised),
    DdimEdit: _Costs(_encoded, _from_latents),
    EdictEdit: _Costs(_encoded, _from_latents),
    DiffEdit: _Costs(_drawn_and_encoded, _masked),
    DisentangledEdit: _Costs(_anchored, _disentangled),
    ContentInjection: _Costs(_source_and_content, _inject),
}


# --- masks and learning ---------------------------------------------------------------------------------------------


def _mask(method: DiffEdit) -> Plan:
    return (Stage(Phase.MASKING, 1, 2 * method.samples),)


def evaluations(steps: int, sampler: Sampler) -> int:
    """Guided predictions of one drawing of a picture."""
    return steps + 1 if sampler is Sampler.PLMS else steps


def _learn(job: LearnJob) -> Plan:
    options, examples = job.options, len(job.examples)
    drawing = evaluations(options.num_inference_steps, options.sampler) * guided(options.guidance_scale) * examples
    # Every example is drawn or encoded once before the first candidate.
    beginning = Stage(Phase.INVERTING, 1, drawing)
    match options.method:
        case Search(switch_steps=switch_steps, late_weights=late_weights):
            return beginning, Stage(Phase.OPTIMIZING, 1, len(switch_steps) * len(late_weights) * drawing)
        case Descent() as method:
            steps = learning_steps(job, method)
            # Forward and back over every step, and once more forward after the last.
            last = steps + (job.state.iteration if job.state else 0) == method.optimization_steps
            measuring = (Stage(Phase.DENOISING, 1, drawing),) if last else ()
            return beginning, Stage(Phase.OPTIMIZING, steps, 2 * drawing), *measuring


def learning_steps(job: LearnJob, method: Descent) -> int:
    """Optimiser steps that are left for this job to do."""
    done = job.state.iteration if job.state else 0
    return min(job.iterations, method.optimization_steps - done)
