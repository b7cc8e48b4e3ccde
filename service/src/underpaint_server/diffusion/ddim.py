"""The move between two noise levels, from which every deterministic sampler here is built (Song et al., ICLR 2021).

``s`` is the level the latents are at, ``t`` the level they go to; either may be the noisier one.
"""

from math import sqrt

import torch
from torch import Tensor

from underpaint_server.diffusion.schedule import Grid, Level, downwards
from underpaint_server.jobs import DdimConvention


def coefficients(s: Level, t: Level) -> tuple[float, float]:
    """(a, b) of ``x_t = a x_s + b eps``: DDIM's eq. 12 with eta 0, solved for the two factors."""
    a = sqrt(t.alpha_bar / s.alpha_bar)
    return a, sqrt(1 - t.alpha_bar) - a * sqrt(1 - s.alpha_bar)


def move(latents: Tensor, noise_pred: Tensor, s: Level, t: Level) -> Tensor:
    """Latents (c, h, w) taken from level s to level t along ``noise_pred``, float64."""
    a, b = coefficients(s, t)
    return a * latents + b * noise_pred


def step(latents: Tensor, noise_pred: Tensor, s: Level, t: Level, noise: Tensor | None = None) -> Tensor:
    """``move`` to a cleaner level; with standard normal ``noise``, eta is 1 instead of 0 (DDIM's eqs. 12 and 16)."""
    moved = move(latents, noise_pred, s, t)
    if noise is None:
        return moved
    sigma = sqrt((1 - t.alpha_bar) / (1 - s.alpha_bar) * (1 - s.alpha_bar / t.alpha_bar))
    kept = sqrt(max(0.0, 1 - t.alpha_bar - sigma**2)) - sqrt(1 - t.alpha_bar)
    return moved + kept * noise_pred + sigma * noise


def redirect(moved: Tensor, noise_pred: Tensor, mapped_pred: Tensor, s: Level, t: Level) -> Tensor:
    """Latents that went from s to t along ``noise_pred``, had their clean picture been that of ``mapped_pred``.

    Asymmetric sampling (Kwon et al., ICLR 2023) as a difference: equal predictions change no bit.
    """
    return moved - sqrt(t.alpha_bar * (1 - s.alpha_bar) / s.alpha_bar) * (mapped_pred - noise_pred)


def inversion_levels(grid: Grid, convention: DdimConvention) -> list[Level]:
    """For each step of an inversion, from the clean end: the timestep passed to the network, with the alpha_bar of the
    current latents."""
    upwards = reversed(downwards(grid))
    if convention is DdimConvention.CURRENT:
        return [clean for _, _, clean in upwards]
    return [Level(noisy.timestep, clean.alpha_bar) for _, noisy, clean in upwards]


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
