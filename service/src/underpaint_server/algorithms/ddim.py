"""DDIM inversion and regeneration (Song et al., ICLR 2021; inversion as in Dhariwal and Nichol, 2021, appendix F).

Inverting a step s -> t needs the prediction at t, where the latents are not yet. Two stand-ins are in use, and neither
is exact: ``target`` tells the network t with the latents of s (diffusers' inverse scheduler, null-text inversion),
``current`` tells it s (the papers of DDIM, DiffEdit and InjectFusion).
"""

from itertools import pairwise

import torch
from torch import Tensor

from underpaint_server.diffusion.ddim import move
from underpaint_server.diffusion.sampling import denoise, guided
from underpaint_server.diffusion.schedule import Level
from underpaint_server.diffusion.tasks import Editing, Inverting, Outcome
from underpaint_server.jobs import DdimConvention, DdimInversion
from underpaint_server.rows import Steps


def invert(task: Inverting) -> Steps[dict[str, Tensor]]:
    """``source`` and ``trajectory`` (n + 1, c, h, w), whose entry k is at level k of the grid."""
    assert isinstance(task.options.method, DdimInversion)
    told_target = task.options.method.convention is DdimConvention.TARGET
    trajectory = [task.source]
    for s, t in pairwise(task.grid):
        told = Level(t.timestep, s.alpha_bar) if told_target else s
        noise_pred = yield from guided(trajectory[-1], told, task.guidance)
        trajectory.append(move(trajectory[-1], noise_pred, s, t))
    return {"source": task.source, "trajectory": torch.stack(trajectory)}


def edit(task: Editing) -> Steps[Outcome]:
    """From the noisy end of the trajectory back to the image's level with the target prompt."""
    return Outcome((yield from denoise(task.arrays["trajectory"][-1], task.grid, task.guidance)))
