"""Noise levels, and the grids of levels that a sampler goes through."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Spacing(Enum):
    """How the steps are spaced over the training timesteps (diffusers' ``timestep_spacing``)."""

    LEADING = "leading"
    TRAILING = "trailing"
    LINSPACE = "linspace"


@dataclass(frozen=True, slots=True)
class Level:
    """One noise level: ``x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise``."""

    timestep: int
    """The timestep passed to the network at this level."""
    alpha_bar: float
    """Cumulative product of alphas, (0, 1]."""


Grid = tuple[Level, ...]
"""Levels from clean to noisy. ``grid[0]`` is the level of a finished image, ``len(grid) - 1`` the number of steps."""


class Step(NamedTuple):
    """Two neighbouring levels of a grid."""

    number: int
    """Index of ``noisy`` in the grid: the number of steps at the noisiest step, 1 at the last."""
    noisy: Level
    clean: Level


def downwards(grid: Grid) -> list[Step]:
    """The steps of a grid, noisiest first. Inversions use the same list in reverse."""
    return [Step(k, grid[k], grid[k - 1]) for k in range(len(grid) - 1, 0, -1)]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The noise schedule that a network was trained with."""

    alphas_cumprod: Sequence[float]
    """alpha_bar of each training timestep, decreasing."""
    spacing: Spacing = Spacing.LEADING
    steps_offset: int = 0
    """Added to every timestep with LEADING spacing, as in diffusers."""
    set_alpha_to_one: bool = False
    """Whether a finished image has alpha_bar 1; otherwise that of timestep 0, as in Stable Diffusion."""

    @property
    def max_steps(self) -> int:
        """Largest number of steps: with more, some would lead to the level where they begin."""
        return len(self.alphas_cumprod) - (self.steps_offset if self.spacing is Spacing.LEADING else 0)

    def grid(self, num_inference_steps: int, used: int | None = None) -> Grid:
        """The grid of the ``used`` least noisy steps (all by default) of a schedule of ``num_inference_steps``, at
        most :attr:`max_steps`.

        Each step joins two neighbours of the grid, also where the number of steps does not divide the number of
        training timesteps; no level is found by subtracting timesteps.
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
    """alphas_cumprod of Stable Diffusion's schedule: the square roots of the betas are linear."""
    low, high = start**0.5, end**0.5
    return cumulate([(low + (high - low) * k / (timesteps - 1)) ** 2 for k in range(timesteps)])


def linear(start: float, end: float, timesteps: int) -> list[float]:
    """alphas_cumprod of DDPM's schedule (Ho et al., NeurIPS 2020): the betas are linear."""
    return cumulate([start + (end - start) * k / (timesteps - 1) for k in range(timesteps)])


def cumulate(betas: Sequence[float]) -> list[float]:
    """alphas_cumprod for given betas: the cumulative product of ``1 - beta``."""
    product, result = 1.0, []
    for beta in betas:
        product *= 1.0 - beta
        result.append(product)
    return result
