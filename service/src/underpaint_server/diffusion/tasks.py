"""What every method is given, and what it gives back."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from underpaint_server.diffusion.sampling import Guidance
from underpaint_server.diffusion.schedule import Grid, Level
from underpaint_server.jobs import EditMethod, InversionOptions, LearnOptions, LearnState, Notice, Sampler


@dataclass(frozen=True, slots=True, eq=False)
class Inverting:
    """The way from an image to noise."""

    source: Tensor
    """(c, h, w), float64: the encoded image."""
    grid: Grid
    """Levels from the image's to the noisiest used."""
    guidance: Guidance
    options: InversionOptions


@dataclass(frozen=True, slots=True, eq=False)
class Masking:
    """The question where an edit would change an image."""

    source: Tensor
    """(c, h, w), float64: the encoded image."""
    level: Level
    """How much noise the two predictions are compared under."""
    target_embeds: Tensor
    reference_embeds: Tensor
    samples: int
    noise: Callable[[str, int], Tensor]
    """(purpose, index) -> standard normal (c, h, w), float64."""


@dataclass(frozen=True, slots=True, eq=False)
class Mixing:
    """A picture and two texts to draw it with, mixed by one weight a step."""

    grid: Grid
    """Levels of the whole schedule."""
    source_embeds: Tensor
    """(tokens, width): at a weight of 1."""
    target_embeds: Tensor
    """(tokens, width): at a weight of 0."""
    negative_embeds: Tensor
    guidance_scale: float
    sampler: Sampler
    start: Tensor
    """(c, h, w), float64, at the noisiest level."""
    residuals: Tensor | None
    """(n, c, h, w), float64, added after each step, noisiest first: what makes a weight of 1 lead back to a real
    picture. None where the model draws the picture itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Learning:
    """Weights to learn."""

    examples: Sequence[Mixing]
    """What to learn on; all of one length."""
    references: Sequence[Tensor]
    """(c, h, w), float64: each example at a weight of 1."""
    options: LearnOptions
    state: LearnState | None
    iterations: int


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """What content injection puts in, and where."""

    features: Mapping[str, Tensor]
    """Feature site -> (m, c, h, w), recorded in the m steps of the content's inversion."""
    timesteps: Sequence[int]
    """What the network was told in each of these steps."""
    region: Tensor | None
    """(h, w) at latent resolution, 1 = takes the content; None is everywhere."""
    injected: Container[int]
    """Levels of the grid whose steps take content."""
    boosted: int
    """Steps from this level of the grid down add fresh noise."""


@dataclass(frozen=True, slots=True, eq=False)
class Editing:
    """The way back from noise to a changed image."""

    arrays: Mapping[str, Tensor]
    """Of the inversion (see ``jobs.Inversion.arrays``), float64; ``source`` alone where the method inverts nothing."""
    grid: Grid
    """Levels from the image's to the one the arrays reach."""
    guidance: Guidance
    """Towards the target prompt."""
    mixing_coefficient: float
    """EDICT's p of the inversion; 1 elsewhere."""
    noise: Callable[[str, int], Tensor]
    """(purpose, index) -> standard normal (c, h, w), float64."""
    method: EditMethod | None = None
    masking: Masking | None = None
    """Where the mask is to be computed."""
    mask: Tensor | None = None
    """(h, w), 1 = may change: where it is given instead."""
    mixing: Mixing | None = None
    """Where two texts are mixed."""
    content: Content | None = None
    """Where the method injects one."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a method arrives at."""

    latents: Tensor
    """(c, h, w), float64, at the image's level."""
    mask: Tensor | None = None
    """(h, w), 1 = may change."""
    notices: tuple[Notice, ...] = ()
