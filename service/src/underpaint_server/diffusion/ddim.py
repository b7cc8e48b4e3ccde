"""The move between two noise levels, from which every deterministic sampler here is built (Song et al., ICLR 2021).

``s`` is the level the latents are at, ``t`` the level they go to; either may be the noisier one.
"""

from math import sqrt

import torch
from torch import Tensor

from underpaint_server.diffusion.schedule import Level


def coefficients(s: Level, t: Level) -> tuple[float, float]:
    """(a, b) of ``x_t = a x_s + b eps``: DDIM's eq. 12 with eta 0, solved for the two factors."""
    a = sqrt(t.alpha_bar / s.alpha_bar)
    return a, sqrt(1 - t.alpha_bar) - a * sqrt(1 - s.alpha_bar)


def move(latents: Tensor, noise_pred: Tensor, s: Level, t: Level) -> Tensor:
    """Latents (c, h, w) taken from level s to level t along ``noise_pred``, float64."""
    a, b = coefficients(s, t)
    return a * latents + b * noise_pred


def add_noise(latents: Tensor, noise: Tensor, level: Level) -> Tensor:
    """Clean latents (c, h, w) brought to ``level`` with the given standard normal noise."""
    return sqrt(level.alpha_bar) * latents + sqrt(1 - level.alpha_bar) * noise


def pred_x0(latents: Tensor, noise_pred: Tensor, alpha_bar: float) -> Tensor:
    """The clean latents that a noise prediction stands for."""
    return (latents - sqrt(1 - alpha_bar) * noise_pred) / sqrt(alpha_bar)


def epsilon_from_v(latents: Tensor, v_pred: Tensor, alpha_bar: float) -> Tensor:
    """Noise prediction of a network that predicts v (Salimans and Ho, ICLR 2022, appendix D)."""
    return sqrt(alpha_bar) * v_pred + sqrt(1 - alpha_bar) * latents


def epsilon_from_x0(latents: Tensor, x0_pred: Tensor, alpha_bar: float) -> Tensor:
    """Noise prediction of a network that predicts the clean latents; none where there is no noise."""
    if alpha_bar == 1.0:
        return torch.zeros_like(latents)
    return (latents - sqrt(alpha_bar) * x0_pred) / sqrt(1 - alpha_bar)
