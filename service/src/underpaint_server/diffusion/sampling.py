"""Guided noise predictions and DDIM sampling, as generators of rows."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from torch import Tensor

from underpaint_server.diffusion.ddim import move
from underpaint_server.diffusion.schedule import Grid, Level, downwards
from underpaint_server.rows import Captured, Denoise, FeatureMap, Row, Steps

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Guidance:
    """Classifier-free guidance (Ho and Salimans, 2022)."""

    prompt_embeds: Tensor
    """(tokens, width): of the prompt that is guided towards."""
    negative_prompt_embeds: Tensor
    """(tokens, width): of the negative prompt, guided away from."""
    scale: float
    """Guidance scale; 1 is no guidance."""
    name: Hashable = None
    """Equal for guidance with equal prompts and scale, to be part of the names of rows; None where there is none."""

    @property
    def is_plain(self) -> bool:
        """Whether the prediction with the prompt is the guided one: without guidance, or if both prompts are the same
        tensor. It then needs one row instead of two."""
        return self.scale == 1.0 or self.prompt_embeds is self.negative_prompt_embeds


def guided(
    latents: Tensor, level: Level, guidance: Guidance, maps: Mapping[str, FeatureMap] | None = None
) -> Steps[Tensor]:
    """Guided noise prediction (c, h, w), float64.

    ``level`` has the timestep passed to the network and the alpha_bar of ``latents``. ``maps`` are applied to the
    activations of each row, with and without the prompt.
    """
    towards = Denoise(latents, level.timestep, level.alpha_bar, guidance.prompt_embeds, maps=maps or {})
    if guidance.is_plain:
        (noise_pred,) = yield [towards]
    else:
        away, noise_pred = yield [replace(towards, prompt_embeds=guidance.negative_prompt_embeds), towards]
        noise_pred = away + guidance.scale * (noise_pred - away)
    return cast(Tensor, noise_pred)


def observed(latents: Tensor, level: Level, guidance: Guidance, sites: tuple[str, ...]) -> Steps[Captured]:
    """Like ``guided``, and the activations (c, h, w), float32, of the row with the prompt at ``sites``."""
    if not sites:
        return Captured((yield from guided(latents, level, guidance)), {})
    towards = Denoise(latents, level.timestep, level.alpha_bar, guidance.prompt_embeds, capture=sites)
    if guidance.is_plain:
        (captured,) = yield [towards]
        return cast(Captured, captured)
    away, captured = yield [replace(towards, prompt_embeds=guidance.negative_prompt_embeds, capture=()), towards]
    return Captured(away + guidance.scale * (captured.noise_pred - away), captured.features)


def together(*parts: Steps[T]) -> Steps[list[T]]:
    """Run independent generators in lockstep: their current groups are yielded as one, so that the rows share passes.

    Returns the result of each generator, in order. A generator that ends early yields no more rows.
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
    """DDIM sampling with eta = 0: ``latents`` (c, h, w), float64, from the noisiest level of the grid to its clean
    end."""
    for _, noisy, clean in downwards(grid):
        noise_pred = yield from guided(latents, noisy, guidance)
        latents = move(latents, noise_pred, noisy, clean)
    return latents
