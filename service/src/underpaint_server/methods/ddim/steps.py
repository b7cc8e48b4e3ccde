"""DDIM inversion and regeneration (Song et al., ICLR 2021; inversion as in Dhariwal and Nichol, 2021, appendix F).

Inverting a step from level s to t needs the noise prediction for the latents at t, which are not known yet. Two
approximations are in use: ``target`` passes the timestep of t with the latents at s (diffusers' inverse scheduler,
null-text inversion), ``current`` passes the timestep of s (the papers of DDIM, DiffEdit and InjectFusion).
"""

import torch
from torch import Tensor

from underpaint_server.diffusion.ddim import inversion_levels, move
from underpaint_server.diffusion.features import to_half
from underpaint_server.diffusion.sampling import denoise, observed
from underpaint_server.diffusion.schedule import downwards
from underpaint_server.methods.ddim.options import DdimInversion
from underpaint_server.methods.task import Editing, Inverting, Outcome
from underpaint_server.rows import Steps


def invert(task: Inverting) -> Steps[dict[str, Tensor]]:
    """Invert by n DDIM steps: ``source`` and ``trajectory`` (n + 1, c, h, w), float64, entry k at level k of the grid.

    For each feature site also ``h_mid``, ... (n, c, h, w), float16: the activations of each step, of the row with the
    prompt.
    """
    method = task.options.method
    assert isinstance(method, DdimInversion)
    trajectory = [task.source]
    recorded: dict[str, list[Tensor]] = {site: [] for site in method.features}
    levels = inversion_levels(task.grid, method.convention)
    for (_, noisy, clean), level in zip(reversed(downwards(task.grid)), levels, strict=True):
        captured = yield from observed(trajectory[-1], level, task.guidance, method.features)
        trajectory.append(move(trajectory[-1], captured.noise_pred, clean, noisy))
        for site, activations in recorded.items():
            activations.append(to_half(captured.features[site]))
    features = {f"h_{site}": torch.stack(activations) for site, activations in recorded.items()}
    return {"source": task.source, "trajectory": torch.stack(trajectory), **features}


def from_noise(noise: Tensor) -> dict[str, Tensor]:
    """The trajectory of a generated source: only its noisy end, the noise (c, h, w) that it is generated from."""
    return {"trajectory": noise[None]}


def edit(task: Editing[object, None]) -> Steps[Outcome]:
    """Denoise the noisiest latents of the trajectory with the target prompt."""
    return Outcome((yield from denoise(task.arrays["trajectory"][-1], task.grid, task.guidance)))
