"""Content injection: one picture's content in the look of another (Jeong, Kwon, Uh; WACV 2024; arXiv 2303.15403).

Generation starts from the noisy end of the *source's* DDIM inversion, so it would draw the source again. At each
injection step the network is asked twice about the same latents: plainly, and with the activation h of its middle block
mixed with the content's, which was recorded while that picture was inverted. The clean picture is taken from the mixed
prediction and the direction of the noise from the plain one, as in asymmetric sampling (Kwon et al., ICLR 2023).

Where skip connections are calibrated, the latents are instead moved to where the plain prediction says nearly the same,
and a third prediction takes the step. Towards the end, fresh noise may be added for quality.
"""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from underpaint_server.diffusion import features
from underpaint_server.diffusion.ddim import redirect, step
from underpaint_server.diffusion.sampling import guided, together
from underpaint_server.diffusion.tasks import Content, Editing, Outcome
from underpaint_server.jobs import ContentInjection
from underpaint_server.rows import FeatureMap, Steps


def edit(task: Editing) -> Steps[Outcome]:
    """The source drawn again with the content in it. Without weight and boosting, this is DDIM's regeneration."""
    assert isinstance(task.method, ContentInjection)
    assert task.content is not None
    latents = task.arrays["trajectory"][-1]
    for k in range(len(task.grid) - 1, 0, -1):
        noise = task.noise("boosting", k) if k <= task.content.boosted else None
        if k in task.content.injected:
            latents = yield from _injected(latents, k, noise, task, task.method, task.content)
        else:
            noise_pred = yield from guided(latents, task.grid[k], task.guidance)
            latents = step(latents, noise_pred, task.grid[k], task.grid[k - 1], noise)
    return Outcome(latents)


def _injected(
    latents: Tensor, k: int, noise: Tensor | None, task: Editing, method: ContentInjection, content: Content
) -> Steps[Tensor]:
    noisy, clean = task.grid[k], task.grid[k - 1]
    maps = _maps(content, noisy.timestep, method)
    plain, mapped = yield from together(
        guided(latents, noisy, task.guidance), guided(latents, noisy, task.guidance, maps)
    )
    if method.calibration == 0:
        return redirect(step(latents, plain, noisy, clean, noise), plain, mapped, noisy, clean)
    latents = features.calibrate(latents, plain, mapped, noisy, method.calibration)
    noise_pred = yield from guided(latents, noisy, task.guidance)
    return step(latents, noise_pred, noisy, clean, noise)


def _maps(content: Content, timestep: int, method: ContentInjection) -> Mapping[str, FeatureMap]:
    """One map a site: towards what the content had there when the network was told nearly this timestep."""
    nearest = min(range(len(content.timesteps)), key=lambda i: abs(content.timesteps[i] - timestep))
    return {
        site: partial(_mixed, recorded[nearest], content.region, method) for site, recorded in content.features.items()
    }


def _mixed(recorded: Tensor, region: Tensor | None, method: ContentInjection, own: Tensor) -> Tensor:
    if region is not None:
        region = features.to_feature_size(region, *own.shape[1:])
    return features.inject(own, recorded, method.weight, method.interpolation, region)
