"""DDIM inversion and regeneration (Song et al., ICLR 2021; inversion as in Dhariwal and Nichol, 2021, appendix F).

Inverting a step s -> t needs the prediction at t, where the latents are not yet. Two stand-ins are in use, and neither
is exact: ``target`` passes t to the network with the latents of s (diffusers' inverse scheduler, null-text inversion),
``current`` passes s (the papers of DDIM, DiffEdit and InjectFusion).
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
    """``source`` and ``trajectory`` (n + 1, c, h, w), whose entry k is at level k of the grid.

    For each feature site also ``h_mid``, ... (n, c, h, w), float16: the activation there in step k, under the text.
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


def edit(task: Editing[object, None]) -> Steps[Outcome]:
    """From the noisy end of the trajectory back to the image's level with the target prompt."""
    return Outcome((yield from denoise(task.arrays["trajectory"][-1], task.grid, task.guidance)))
