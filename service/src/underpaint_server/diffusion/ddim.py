"""The DDIM update between two noise levels, which every sampler here uses (Song et al., ICLR 2021).

``s`` is the level of the current latents, ``t`` the level of the result; either may be the noisier one. Latents and
noise predictions are (c, h, w), float64.
"""

from math import sqrt

import torch
from torch import Tensor

from underpaint_server.diffusion.schedule import Grid, Level, downwards
from underpaint_server.jobs import DdimConvention


def coefficients(s: Level, t: Level) -> tuple[float, float]:
    """(a, b) of ``x_t = a x_s + b eps``: DDIM's eq. 12 with eta = 0, written with two factors."""
    a = sqrt(t.alpha_bar / s.alpha_bar)
    return a, sqrt(1 - t.alpha_bar) - a * sqrt(1 - s.alpha_bar)


def move(latents: Tensor, noise_pred: Tensor, s: Level, t: Level) -> Tensor:
    """The latents at level t, from those at level s and the noise prediction (DDIM's eq. 12 with eta = 0)."""
    a, b = coefficients(s, t)
    return a * latents + b * noise_pred


def step(latents: Tensor, noise_pred: Tensor, s: Level, t: Level, noise: Tensor | None = None) -> Tensor:
    """Like ``move``, to a less noisy level t. With standard normal ``noise``, eta is 1 instead of 0 (DDIM's eqs. 12 and
    16)."""
    moved = move(latents, noise_pred, s, t)
    if noise is None:
        return moved
    sigma = sqrt((1 - t.alpha_bar) / (1 - s.alpha_bar) * (1 - s.alpha_bar / t.alpha_bar))
    kept = sqrt(max(0.0, 1 - t.alpha_bar - sigma**2)) - sqrt(1 - t.alpha_bar)
    return moved + kept * noise_pred + sigma * noise


def redirect(moved: Tensor, noise_pred: Tensor, mapped_pred: Tensor, s: Level, t: Level) -> Tensor:
    """Replace the predicted x0 in an update by that of another prediction: asymmetric sampling (Kwon et al., ICLR
    2023).

    ``moved`` is the result of the update from s to t with ``noise_pred``; in the returned latents the predicted x0 is
    that of ``mapped_pred`` and the direction of the noise still that of ``noise_pred``. It is computed as a difference,
    so that equal predictions return ``moved`` bitwise.
    """
    return moved - sqrt(t.alpha_bar * (1 - s.alpha_bar) / s.alpha_bar) * (mapped_pred - noise_pred)


def inversion_levels(grid: Grid, convention: DdimConvention) -> list[Level]:
    """For each step of an inversion, from the clean end: the timestep passed to the network, with the alpha_bar of the
    current latents. One entry per step."""
    upwards = reversed(downwards(grid))
    if convention is DdimConvention.CURRENT:
        return [clean for _, _, clean in upwards]
    return [Level(noisy.timestep, clean.alpha_bar) for _, noisy, clean in upwards]


def add_noise(latents: Tensor, noise: Tensor, level: Level) -> Tensor:
    """Clean latents noised to ``level`` with the given standard normal noise (DDIM's eq. 4)."""
    return sqrt(level.alpha_bar) * latents + sqrt(1 - level.alpha_bar) * noise


def pred_x0(latents: Tensor, noise_pred: Tensor, alpha_bar: float) -> Tensor:
    """The clean latents x0 that a noise prediction implies (DDIM's eq. 9)."""
    return (latents - sqrt(1 - alpha_bar) * noise_pred) / sqrt(alpha_bar)


def epsilon_from_v(latents: Tensor, v_pred: Tensor, alpha_bar: Tensor) -> Tensor:
    """Noise prediction from the output of a network that predicts v (Salimans and Ho, ICLR 2022, appendix D).

    ``alpha_bar`` is one number for each of the latents, float64, and broadcasts with them.
    """
    return alpha_bar.sqrt() * v_pred + (1 - alpha_bar).sqrt() * latents


def epsilon_from_x0(latents: Tensor, x0_pred: Tensor, alpha_bar: Tensor) -> Tensor:
    """Noise prediction from the output of a network that predicts x0; zeros where ``alpha_bar`` is 1. For
    ``alpha_bar`` see :func:`epsilon_from_v`."""
    noise = (1 - alpha_bar).sqrt()
    is_clean = noise == 0
    noise_pred = (latents - alpha_bar.sqrt() * x0_pred) / torch.where(is_clean, 1.0, noise)
    return torch.where(is_clean, 0.0, noise_pred)
