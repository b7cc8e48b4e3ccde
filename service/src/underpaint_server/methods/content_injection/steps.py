"""Content injection: one image's content in the look of another (Jeong, Kwon, Uh; WACV 2024; arXiv 2303.15403).

Generation starts from the noisy end of the *source's* DDIM inversion, so it would draw the source again. At each
injection step the network is asked twice about the same latents: plainly, and with the activation h of its middle block
mixed with the content's, which was recorded while that image was inverted. The clean image is taken from the mixed
prediction and the direction of the noise from the plain one, as in asymmetric sampling (Kwon et al., ICLR 2023).

Where skip connections are calibrated, the latents are instead moved to where the plain prediction says nearly the same,
and a third prediction takes the step. Towards the end, fresh noise may be added for quality.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from underpaint_server.diffusion import features
from underpaint_server.diffusion.ddim import redirect, step
from underpaint_server.diffusion.sampling import guided, together
from underpaint_server.diffusion.schedule import Level, downwards
from underpaint_server.methods.content_injection.options import ContentInjection
from underpaint_server.methods.task import Editing, Outcome
from underpaint_server.rows import FeatureMap, Steps


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """What is injected, and where."""

    features: Mapping[str, Tensor]
    """Feature site -> (m, c, h, w), recorded in the m steps of the content's inversion."""
    timesteps: Sequence[int]
    """The timestep that the network got in each of these steps."""
    region: Tensor | None
    """(h, w) at latent resolution, 1 = takes the content; None is everywhere."""
    injected: Container[int]
    """Numbers of the steps that take content."""
    boosted: int
    """Steps from this number down add fresh noise."""


def edit(task: Editing[ContentInjection, Content]) -> Steps[Outcome]:
    """The source drawn again with the content in it. Without weight and boosting, this is DDIM's regeneration."""
    latents = task.arrays["trajectory"][-1]
    for k, noisy, clean in downwards(task.grid):
        noise = task.noise("boosting", k) if k <= task.extra.boosted else None
        if k in task.extra.injected:
            latents = yield from _injected(latents, noisy, clean, noise, task)
        else:
            noise_pred = yield from guided(latents, noisy, task.guidance)
            latents = step(latents, noise_pred, noisy, clean, noise)
    return Outcome(latents)


def _injected(
    latents: Tensor, noisy: Level, clean: Level, noise: Tensor | None, task: Editing[ContentInjection, Content]
) -> Steps[Tensor]:
    options = task.options
    maps = _maps(task.extra, noisy.timestep, options)
    plain, mapped = yield from together(
        guided(latents, noisy, task.guidance), guided(latents, noisy, task.guidance, maps)
    )
    if options.calibration == 0:
        return redirect(step(latents, plain, noisy, clean, noise), plain, mapped, noisy, clean)
    latents = features.calibrate(latents, plain, mapped, noisy, options.calibration)
    noise_pred = yield from guided(latents, noisy, task.guidance)
    return step(latents, noise_pred, noisy, clean, noise)


def _maps(content: Content, timestep: int, options: ContentInjection) -> Mapping[str, FeatureMap]:
    """One map a site: towards the content's activation there at the nearest timestep."""
    nearest = min(range(len(content.timesteps)), key=lambda i: abs(content.timesteps[i] - timestep))
    return {
        site: partial(_mixed, recorded[nearest], content.region, options) for site, recorded in content.features.items()
    }


def _mixed(recorded: Tensor, region: Tensor | None, options: ContentInjection, own: Tensor) -> Tensor:
    if region is not None:
        region = features.to_feature_size(region, *own.shape[1:])
    return features.inject(own, recorded, options.weight, options.interpolation, region)
