"""Options and cost of content injection (Jeong, Kwon, Uh; WACV 2024; arXiv 2303.15403)."""

from dataclasses import dataclass, field
from typing import ClassVar

from underpaint_server.jobs import EditJob, EditOptions, Interpolation, InversionOptions, Phase, Picture
from underpaint_server.methods.base import Method
from underpaint_server.methods.cost import Plan, Stage, guided_edit, round_down, used_steps
from underpaint_server.methods.ddim.options import DdimInversion


@dataclass(frozen=True, slots=True)
class ContentInjection(EditOptions):
    """Options of content injection: regenerate the source, and mix another image's activations into the network's.

    The other image is the job's ``companion``; its DDIM inversion has the activations of ``sites``.
    """

    name: ClassVar[str] = "content_injection"

    weight: float
    """Share of the content in the mixed activations, [0, 1]: the paper's gamma."""
    calibration: float
    """Strength of the skip-connection calibration, [0, 1]: the paper's omega. 0 is off and saves a prediction per
    step."""
    region: Picture | None = field(repr=False)
    """(height, width), 0 or 255, of the source's size: content is injected where it is 255. None is everywhere."""
    injection_end: float
    """Share of the schedule, [0, 1): the steps below it, the least noisy ones, inject nothing."""
    every: int
    """Inject at every ``every``-th step, counted from the noisiest; at least 1."""
    boosting_start: float
    """Share of the schedule, [0, 1]: the steps below it, but for the last, add fresh noise (eta = 1). 0 is none."""
    interpolation: Interpolation
    sites: tuple[str, ...]
    """Feature sites where content is injected; the paper uses "mid"."""


def injected_steps(method: ContentInjection, options: InversionOptions) -> range:
    """Numbers (n .. 1, noisiest first) of the steps that inject content; ``options`` are those of the source.

    They are counted in steps. Comparing the timesteps of the source's and the content's grid would inject only where
    both grids have the same timestep, which may be at few steps.
    """
    plain = round_down(options.num_inference_steps * method.injection_end)
    return range(used_steps(options.num_inference_steps, options.strength), plain, -method.every)


def boosted_steps(method: ContentInjection, options: InversionOptions) -> int:
    """Number of the least noisy steps that add fresh noise, the last one included, which adds none."""
    return round_down(options.num_inference_steps * method.boosting_start)


def _cost(job: EditJob) -> Plan:
    """One prediction per step; a step that injects needs one more with maps, and with calibration a third one."""
    options = job.method
    assert isinstance(options, ContentInjection)
    assert job.inversion is not None
    n = used_steps(job.inversion.num_inference_steps, job.inversion.strength)
    rows, injected = guided_edit(job), injected_steps(options, job.inversion)
    extra = rows * (2 if options.calibration else 1)
    return (Stage(Phase.DENOISING, n, rows, tuple(extra if k in injected else 0 for k in range(n, 0, -1))),)


METHOD = Method(options=ContentInjection, inversion=DdimInversion, cost=_cost)
