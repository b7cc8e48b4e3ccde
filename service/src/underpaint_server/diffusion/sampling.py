"""Guided predictions and plain sampling, as rows."""

from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from underpaint_server.diffusion.ddim import move
from underpaint_server.diffusion.schedule import Grid, Level
from underpaint_server.rows import Denoise, Steps


@dataclass(frozen=True, slots=True, eq=False)
class Guidance:
    """What the network is steered by: classifier-free guidance (Ho and Salimans, 2022)."""

    prompt_embeds: Tensor
    """(tokens, width): towards."""
    negative_prompt_embeds: Tensor
    """(tokens, width): away from."""
    scale: float
    """1 is no guidance: one row instead of two."""


def guided(latents: Tensor, level: Level, guidance: Guidance) -> Steps[Tensor]:
    """Guided noise prediction (c, h, w), float64: ``latents`` are at ``level.alpha_bar``, the network is told
    ``level.timestep``."""
    towards = Denoise(latents, level.timestep, level.alpha_bar, guidance.prompt_embeds)
    if guidance.scale == 1.0:
        (noise_pred,) = yield [towards]
    else:
        away, noise_pred = yield [replace(towards, prompt_embeds=guidance.negative_prompt_embeds), towards]
        noise_pred = away + guidance.scale * (noise_pred - away)
    return cast(Tensor, noise_pred)


def denoise(latents: Tensor, grid: Grid, guidance: Guidance) -> Steps[Tensor]:
    """DDIM with eta 0: ``latents`` (c, h, w) from the noisiest level of the grid to its clean end."""
    for noisy, clean in zip(grid[:0:-1], grid[-2::-1], strict=True):
        noise_pred = yield from guided(latents, noisy, guidance)
        latents = move(latents, noise_pred, noisy, clean)
    return latents
