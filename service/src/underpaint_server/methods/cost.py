"""The types of a plan, and the costs that several methods share. Whole jobs are in ``underpaint_server.plans``."""

from dataclasses import dataclass
from itertools import accumulate

from underpaint_server.jobs import EditJob, Generated, InversionOptions, Phase, Source


@dataclass(frozen=True, slots=True)
class Stage:
    """One phase of a job: ``steps`` steps of ``rows_per_step`` network rows each."""

    phase: Phase
    steps: int
    rows_per_step: int
    extra: tuple[int, ...] = ()
    """Additional rows of each step, one number per step; empty where there are none."""

    @property
    def rows(self) -> int:
        """Network rows of the whole stage."""
        return self.steps * self.rows_per_step + sum(self.extra)

    def steps_in(self, rows: int) -> int:
        """Number of steps that are finished after ``rows`` rows of this stage."""
        if not self.extra:
            return rows // self.rows_per_step
        ends = accumulate(self.rows_per_step + more for more in self.extra)
        return sum(end <= rows for end in ends)


Plan = tuple[Stage, ...]
"""Stages in the order in which they run; a phase occurs at most once."""


def used_steps(num_inference_steps: int, strength: float) -> int:
    """Number of steps that a strength, (0, 1], uses: ``int(steps * strength)`` as in EDICT's code, at least 1."""
    return max(1, round_down(num_inference_steps * strength))


def round_down(steps: float) -> int:
    """``steps`` rounded down, with a tolerance: 0.7 * 50 is 35 also if 0.7 was a float32."""
    return int(steps + 1e-5)


def guided(guidance_scale: float, *, equal_prompts: bool = False) -> int:
    """Rows of one guided noise prediction: 1 without guidance (scale 1) and where both prompts are equal, else 2."""
    return 1 if guidance_scale == 1.0 or equal_prompts else 2


def guided_edit(job: EditJob) -> int:
    """Rows of one guided noise prediction with the job's target prompt and negative prompt."""
    return guided(job.guidance_scale, equal_prompts=job.target_prompt == job.negative_prompt)


def inverting(options: InversionOptions, prompt: str) -> Plan:
    """The plan of inverting an image with ``prompt`` and without a negative prompt."""
    return (_steps_of(Phase.INVERTING, options, guided(options.guidance_scale, equal_prompts=not prompt)),)


def reconstructing(options: InversionOptions) -> Plan:
    """The plan of denoising an inversion with its own prompt."""
    rows = guided(options.guidance_scale, equal_prompts=not options.source_prompt)
    return (_steps_of(Phase.DENOISING, options, rows),)


def denoising_inversion(job: EditJob) -> Plan:
    """The plan of denoising from the job's inversion, or from the noise of a generated source instead of it."""
    assert job.inversion is not None
    return (_steps_of(Phase.DENOISING, job.inversion, guided_edit(job)),)


def drawing(source: Source, guidance_scale: float) -> Plan:
    """The plan of generating a generated source; empty for other sources."""
    if not isinstance(source, Generated):
        return ()
    rows = guided(guidance_scale, equal_prompts=not source.prompt)
    return (Stage(Phase.INVERTING, source.num_inference_steps, rows),)


def _steps_of(phase: Phase, options: InversionOptions, rows: int) -> Stage:
    n = used_steps(options.num_inference_steps, options.strength)
    return Stage(phase, n, rows * options.method.evaluations_per_step)
