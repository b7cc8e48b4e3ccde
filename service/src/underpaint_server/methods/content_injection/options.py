"""Options and cost of content injection (Jeong, Kwon, Uh; WACV 2024; arXiv 2303.15403)."""

from dataclasses import dataclass, field
from typing import ClassVar

from underpaint_server.jobs import EditJob, EditOptions, Interpolation, InversionOptions, Phase, Picture
from underpaint_server.methods.base import Method
from underpaint_server.methods.cost import Plan, Stage, guided, round_down, used_steps
from underpaint_server.methods.ddim.options import DdimInversion


@dataclass(frozen=True, slots=True)
class ContentInjection(EditOptions):
    """Draw the source again with another image's content in the network's features.

    The other image is the job's ``companion``: a DDIM inversion that has the features of ``sites``.
    """

    name: ClassVar[str] = "content_injection"

    weight: float
    """Share of the content in the mix, [0, 1]: the paper's gamma."""
    calibration: float
    """The paper's omega, [0, 1]: how far skip connections are calibrated; 0 is off, and saves a prediction a step."""
    region: Picture | None = field(repr=False)
    """(height, width), 0 or 255, of the source's size: white takes the content. None is everywhere."""
    injection_end: float
    """Share of the noise schedule at which injection ends, [0, 1): the less noisy steps are plain."""
    every: int
    """Injection at every so many steps, counted from the noisiest."""
    boosting_start: float
    """Share of the schedule from which on down fresh noise is added (eta 1), [0, 1]; 0 is never."""
    interpolation: Interpolation
    sites: tuple[str, ...]
    """Feature sites where the content goes in; "mid" is the paper's."""


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


def _cost(job: EditJob) -> Plan:
    """A plain prediction a step; where content is injected a mapped one too, and a calibrated one if that is on."""
    options = job.method
    assert isinstance(options, ContentInjection)
    assert job.inversion is not None
    n = used_steps(job.inversion.num_inference_steps, job.inversion.strength)
    each, injected = guided(job.guidance_scale), injected_steps(options, job.inversion)
    more = each * (2 if options.calibration else 1)
    return (Stage(Phase.DENOISING, n, each, tuple(more if k in injected else 0 for k in range(n, 0, -1))),)


METHOD = Method(options=ContentInjection, inversion=DdimInversion, cost=_cost)
