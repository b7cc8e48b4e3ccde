"""Content injection: the content of one image in the style of another (Jeong, Kwon, Uh; WACV 2024; arXiv 2303.15403).

Denoising starts from the noisy end of the *source's* DDIM inversion, which alone would regenerate the source. An
injection step computes two noise predictions for the same latents: one as usual, and one with the activation h of the
middle block mixed with the content's, which was captured while the content was inverted. The step takes x0 from the
second and the direction of the noise from the first, as in asymmetric sampling (Kwon et al., ICLR 2023).

With skip-connection calibration, the latents are instead changed so that their usual prediction is near the second one,
and the step uses a third prediction, for these latents. The last steps but one can add fresh noise for quality.
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
    """What is injected, where, and in which steps."""

    features: Mapping[str, Tensor]
    """Feature site -> (m, c, h, w): the activations of the m steps of the content's inversion."""
    timesteps: Sequence[int]
    """The timestep passed to the network in each of these steps."""
    region: Tensor | None
    """(h, w) at latent resolution, 1 = content is injected; None is everywhere."""
    injected: Container[int]
    """Numbers of the steps that inject content."""
    boosted: int
    """Steps with this number or a lower one add fresh noise, but for the last: its noise would stay in the image."""


def edit(task: Editing[ContentInjection, Content]) -> Steps[Outcome]:
    """The source regenerated with the content injected. With weight 0 and no fresh noise this is DDIM regeneration."""
    latents = task.arrays["trajectory"][-1]
    for k, noisy, clean in downwards(task.grid):
        noise = task.noise("boosting", k) if 1 < k <= task.extra.boosted else None
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
    """For each site, the map that mixes in the content's activation at the nearest timestep."""
    nearest = min(range(len(content.timesteps)), key=lambda i: abs(content.timesteps[i] - timestep))
    return {
        site: partial(_mixed, recorded[nearest], content.region, options) for site, recorded in content.features.items()
    }


def _mixed(recorded: Tensor, region: Tensor | None, options: ContentInjection, own: Tensor) -> Tensor:
    if region is not None:
        region = features.to_feature_size(region, *own.shape[1:])
    return features.inject(own, recorded, options.weight, options.interpolation, region)
