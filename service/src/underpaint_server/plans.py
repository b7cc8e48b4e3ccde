"""How many network rows a job will ask for, by phase: plain arithmetic, known before anything runs.

Admission, backlog, progress and deadlines all count with these numbers. A contract test runs every algorithm and
holds the rows it yields against its plan. ``n`` is the number of used steps, guidance doubles a row.
"""

from dataclasses import dataclass

from underpaint_server.jobs import (
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
    Stored,
)


@dataclass(frozen=True, slots=True)
class Stage:
    """One phase of a job: ``steps`` steps of ``rows_per_step`` network rows each."""

    phase: Phase
    steps: int
    rows_per_step: int

    @property
    def rows(self) -> int:
        """Network rows of the whole stage."""
        return self.steps * self.rows_per_step


Plan = tuple[Stage, ...]


def used_steps(num_inference_steps: int, strength: float) -> int:
    """Steps of the schedule that a strength uses, at least one: ``int(S * strength)`` as in EDICT's code.

    The small term keeps 0.7 * 50 at 35 when 0.7 arrived as a float32.
    """
    return max(1, int(num_inference_steps * strength + 1e-5))


def plan(job: Job) -> Plan:
    """The stages of a job in the order they run; a phase may appear once only."""
    match job:
        case InvertJob():
            inverting = _invert(job.options) if job.inversion is None else ()
            return inverting + (_regenerate(job.options, job.options.guidance_scale) if job.verify else ())
        case EditJob():
            return _source(job) + _edit(job)
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


def _source(job: EditJob) -> Plan:
    if isinstance(job.method, DisentangledEdit):
        return _anchor(job.method, job.guidance_scale) if isinstance(job.source, Photo | Stored) else ()
    starts_from_noise = isinstance(job.method, DdimEdit | EdictEdit)
    if isinstance(job.source, Generated):
        drawing = () if starts_from_noise else _drawing(job.source, job.guidance_scale)
        if isinstance(job.method, DiffEdit) and job.inversion is not None:
            # Drawing and encoding are both on the way from a source to latents: one phase.
            (drawn,), (encoded,) = drawing, _invert(job.inversion)
            return (Stage(Phase.INVERTING, 1, drawn.rows + encoded.rows),)
        return drawing
    if isinstance(job.source, Photo) and job.inversion is not None:
        return _invert(job.inversion)
    return ()


def _edit(job: EditJob) -> Plan:
    each = guided(job.guidance_scale)
    match job.method:
        case SdEdit(strength=strength, num_inference_steps=steps):
            return (Stage(Phase.DENOISING, used_steps(steps, strength), each),)
        case DiffEdit() as method:
            assert job.inversion is not None
            masking = _mask(method) if method.mask is None else ()
            return masking + _regenerate(job.inversion, job.guidance_scale)
        case DisentangledEdit(weights=weights, sampler=sampler):
            return (Stage(Phase.DENOISING, 1, evaluations(len(weights), sampler) * each),)
        case DdimEdit() | EdictEdit():
            if isinstance(job.source, Generated):
                pair = 2 if isinstance(job.method, EdictEdit) else 1
                return (Stage(Phase.DENOISING, job.source.num_inference_steps, each * pair),)
            assert job.inversion is not None
            return _regenerate(job.inversion, job.guidance_scale)


def _mask(method: DiffEdit) -> Plan:
    return (Stage(Phase.MASKING, 1, 2 * method.samples),)


def evaluations(steps: int, sampler: Sampler) -> int:
    """Guided predictions of one drawing of a picture."""
    return steps + 1 if sampler is Sampler.PLMS else steps


def _anchor(method: DisentangledEdit, guidance_scale: float) -> Plan:
    """What a real picture's residuals cost."""
    rows = evaluations(len(method.weights), method.sampler) * guided(guidance_scale)
    return (Stage(Phase.INVERTING, 1, rows),)


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
