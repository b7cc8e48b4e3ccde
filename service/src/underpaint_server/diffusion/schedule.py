"""Noise levels, and the grids of them that a sampler walks."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Spacing(Enum):
    """How a grid of S steps is laid over the training timesteps (diffusers' ``timestep_spacing``)."""

    LEADING = "leading"
    TRAILING = "trailing"
    LINSPACE = "linspace"


@dataclass(frozen=True, slots=True)
class Level:
    """One noise level: x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise."""

    timestep: int
    """What the network is told at this level."""
    alpha_bar: float
    """Cumulative product of alphas, (0, 1]."""


Grid = tuple[Level, ...]
"""Levels from clean to noisy. ``grid[0]`` is the level of a finished image, ``len(grid) - 1`` the number of steps."""


class Step(NamedTuple):
    """Two neighbouring levels of a grid."""

    number: int
    """n at the noisiest step, 1 at the last; the index of ``noisy`` in the grid."""
    noisy: Level
    clean: Level


def downwards(grid: Grid) -> list[Step]:
    """Every step of a grid, the noisiest first. Inversions walk the same list in reverse."""
    return [Step(k, grid[k], grid[k - 1]) for k in range(len(grid) - 1, 0, -1)]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The levels a network was trained on."""

    alphas_cumprod: Sequence[float]
    """float64 values, one a training timestep, falling."""
    spacing: Spacing = Spacing.LEADING
    steps_offset: int = 0
    set_alpha_to_one: bool = False
    """Whether a finished picture is at alpha_bar 1, or at that of timestep 0 as Stable Diffusion has it."""

    def grid(self, num_inference_steps: int, used: int | None = None) -> Grid:
        """The lowest ``used`` steps (all by default) of a schedule of ``num_inference_steps``.

        Neighbours of the grid are the pairs that a step joins, also where the number of steps does not divide the
        training timesteps; no step ever looks for a level by subtracting.
        """
        timesteps = self._timesteps(num_inference_steps)[: used or num_inference_steps]
        clean = Level(0, 1.0 if self.set_alpha_to_one else self.alphas_cumprod[0])
        return (clean, *(Level(t, self.alphas_cumprod[t]) for t in timesteps))

    def _timesteps(self, steps: int) -> list[int]:
        trained = len(self.alphas_cumprod)
        match self.spacing:
            case Spacing.LEADING:
                spaced = [k * (trained // steps) + self.steps_offset for k in range(steps)]
            case Spacing.TRAILING:
                spaced = [round(trained - k * trained / steps) - 1 for k in range(steps)][::-1]
            case Spacing.LINSPACE:
                spaced = [round(k * (trained - 1) / max(1, steps - 1)) for k in range(steps)]
        return [min(t, trained - 1) for t in spaced]


def scaled_linear(start: float = 0.00085, end: float = 0.012, timesteps: int = 1000) -> list[float]:
    """alphas_cumprod of Stable Diffusion's schedule: betas linear in their square root."""
    low, high = start**0.5, end**0.5
    return cumulate([(low + (high - low) * k / (timesteps - 1)) ** 2 for k in range(timesteps)])


def linear(start: float, end: float, timesteps: int) -> list[float]:
    """alphas_cumprod of DDPM's schedule: betas linear."""
    return cumulate([start + (end - start) * k / (timesteps - 1) for k in range(timesteps)])


def cumulate(betas: Sequence[float]) -> list[float]:
    """alphas_cumprod of given betas."""
    product, result = 1.0, []
    for beta in betas:
        product *= 1.0 - beta
        result.append(product)
    return result
