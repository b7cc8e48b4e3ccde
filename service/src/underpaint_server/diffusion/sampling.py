"""Guided predictions and plain sampling, as rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from torch import Tensor

from underpaint_server.diffusion.ddim import move
from underpaint_server.diffusion.schedule import Grid, Level, downwards
from underpaint_server.rows import Captured, Denoise, FeatureMap, Row, Steps

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Guidance:
    """What the network is steered by: classifier-free guidance (Ho and Salimans, 2022)."""

    prompt_embeds: Tensor
    """(tokens, width): towards."""
    negative_prompt_embeds: Tensor
    """(tokens, width): away from."""
    scale: float
    """1 is no guidance: one row instead of two."""


def guided(
    latents: Tensor, level: Level, guidance: Guidance, maps: Mapping[str, FeatureMap] | None = None
) -> Steps[Tensor]:
    """Guided noise prediction (c, h, w), float64: ``latents`` are at ``level.alpha_bar``, the network is told
    ``level.timestep``. Each of the rows applies ``maps`` to its own activations."""
    towards = Denoise(latents, level.timestep, level.alpha_bar, guidance.prompt_embeds, maps=maps or {})
    if guidance.scale == 1.0:
        (noise_pred,) = yield [towards]
    else:
        away, noise_pred = yield [replace(towards, prompt_embeds=guidance.negative_prompt_embeds), towards]
        noise_pred = away + guidance.scale * (noise_pred - away)
    return cast(Tensor, noise_pred)


def observed(latents: Tensor, level: Level, guidance: Guidance, sites: tuple[str, ...]) -> Steps[Captured]:
    """``guided``, with the activations (c, h, w), float32, that the row under the text had at ``sites``."""
    if not sites:
        return Captured((yield from guided(latents, level, guidance)), {})
    towards = Denoise(latents, level.timestep, level.alpha_bar, guidance.prompt_embeds, capture=sites)
    if guidance.scale == 1.0:
        (seen,) = yield [towards]
        return cast(Captured, seen)
    away, seen = yield [replace(towards, prompt_embeds=guidance.negative_prompt_embeds, capture=()), towards]
    return Captured(away + guidance.scale * (seen.noise_pred - away), seen.features)


def together(*parts: Steps[T]) -> Steps[list[T]]:
    """Independent programs in lockstep: the groups they wait for are asked as one, so that their rows share passes.

    One that ends before the others asks for nothing more. Answers what each returns, in order.
    """
    results: dict[int, T] = {}
    groups: dict[int, Sequence[Row]] = {}

    def advance(i: int, answers: Sequence[Any] | None) -> None:
        try:
            groups[i] = next(parts[i]) if answers is None else parts[i].send(answers)
        except StopIteration as end:
            groups.pop(i, None)
            results[i] = end.value

    for i in range(len(parts)):
        advance(i, None)
    while groups:
        waiting = dict(groups)
        answers = iter((yield [row for group in waiting.values() for row in group]))
        for i, group in waiting.items():
            advance(i, [next(answers) for _ in group])
    return [results[i] for i in range(len(parts))]


def denoise(latents: Tensor, grid: Grid, guidance: Guidance) -> Steps[Tensor]:
    """DDIM with eta 0: ``latents`` (c, h, w) from the noisiest level of the grid to its clean end."""
    for _, noisy, clean in downwards(grid):
        noise_pred = yield from guided(latents, noisy, guidance)
        latents = move(latents, noise_pred, noisy, clean)
    return latents
