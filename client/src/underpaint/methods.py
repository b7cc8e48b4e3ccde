"""What can be asked for: sources, ways to invert, ways to edit. None takes the server's default."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from underpaint.images import ImageLike

if TYPE_CHECKING:
    from underpaint.results import Direction, InversionHandle


class Fit(StrEnum):
    """How a photo of another size or aspect is brought to the model's size. EXIF orientation is applied first."""

    CROP = "crop"
    """Scaled until the model's square is covered, then cropped to its centre."""
    PAD = "pad"
    """Scaled until it lies inside the model's square, edge pixels repeated around it."""
    RESIZE = "resize"
    """Aspect kept: scaled to the model's pixel count, sides rounded to what the model needs."""


class Priority(StrEnum):
    """Order within the server's queue."""

    BATCH = "batch"
    """Yields to everything else."""
    NORMAL = "normal"
    """Ordinary work."""
    INTERACTIVE = "interactive"
    """A person is waiting."""


class Convention(StrEnum):
    """The timestep that the network is told while DDIM inverts a step to a noisier level."""

    TARGET = "target"
    """The level it is going to."""
    CURRENT = "current"
    """The level it is at."""


class Interpolation(StrEnum):
    """How content injection mixes two activations, the content's brought to the norm of the source's before."""

    SLERP = "slerp"
    """Along the great circle: the norm stays."""
    LERP = "lerp"
    """Along the chord: the norm shrinks in between. A control to compare with."""


class Sampler(StrEnum):
    """How a disentangled edit draws its picture."""

    DDIM = "ddim"
    """By the last prediction alone."""
    PLMS = "plms"
    """By the last four: one evaluation more, and smaller errors."""


# --- how to invert ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EdictInversion:
    """Exact inversion through coupled latents (Wallace et al., CVPR 2023)."""

    mixing_coefficient: float | None = None
    """EDICT's p, (0, 1]; nearer to 1 is stabler over many steps, farther mixes the pair more. Server: 0.93."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DdimInversion:
    """DDIM run backwards (Song et al., ICLR 2021): cheaper than EDICT, and an approximation."""

    convention: Convention | str | None = None
    """Which timestep the network is told. Server: target."""
    features: Sequence[str] = ()
    """Sites of the network whose activations are kept for content injection: some of ``Model.feature_sites``."""


InversionMethod = EdictInversion | DdimInversion


# --- what to edit -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Generated:
    """A picture that the model draws itself, as the thing to edit."""

    prompt: str
    """Text of the picture."""
    seed: int | None = None
    """Noise it starts from, 0 .. 2**64 - 1; None draws one, which the answer reports."""
    width: int | None = None
    """Pixels; None takes the model's own size."""
    height: int | None = None
    """See ``width``."""
    steps: int | None = None
    """Steps of the schedule."""


# --- how to edit ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Edict:
    """Invert exactly, come back with the target prompt (Wallace et al., CVPR 2023). Keeps what the prompts share.

    All settings are those of the inversion: leave them out where the source is an inversion or a generated picture.
    """

    steps: int | None = None
    """Steps of the whole schedule."""
    strength: float | None = None
    """Share of the schedule that is inverted, (0, 1]: 0 keeps the photo, 1 goes all the way to noise."""
    mixing_coefficient: float | None = None
    """EDICT's p, (0, 1]."""
    inversion_guidance_scale: float | None = None
    """Classifier-free guidance weight while inverting; 1 is off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ddim:
    """Invert with DDIM, come back with the target prompt (Song et al., ICLR 2021).

    All settings are those of the inversion: leave them out where the source is an inversion or a generated picture.
    """

    steps: int | None = None
    """Steps of the whole schedule."""
    strength: float | None = None
    """Share of the schedule that is inverted, (0, 1]."""
    convention: Convention | str | None = None
    """Which timestep the network is told while inverting."""
    inversion_guidance_scale: float | None = None
    """Classifier-free guidance weight while inverting; 1 is off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SdEdit:
    """Add noise up to a strength, denoise with the target prompt (Meng et al., ICLR 2022): image-to-image."""

    strength: float | None = None
    """Share of the schedule that is run, (0, 1]. Server: 0.8."""
    steps: int | None = None
    """Steps of the whole schedule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffEdit:
    """Find the region from two prompts, edit there, keep the rest (Couairon et al., ICLR 2023).

    ``steps``, ``strength``, ``convention`` and ``inversion_guidance_scale`` are those of the inversion: leave them out
    where the source is an inversion or a generated picture.
    """

    mask: ImageLike | None = field(default=None, repr=False)
    """Replaces the computed mask: 8-bit grey, white is changed; as large as the photo, or as the model's picture."""
    threshold: float | None = None
    """Cut of the normalised difference, (0, 1). Server: 0.5."""
    samples: int | None = None
    """Noise samples that the difference is averaged over. Server: 10."""
    mask_strength: float | None = None
    """Share of the schedule at which the difference is taken, (0, 1). Server: 0.5."""
    reference_prompt: str = ""
    """Prompt that the target prompt is compared with."""
    steps: int | None = None
    """Steps of the whole schedule."""
    strength: float | None = None
    """Share of the schedule that is encoded and run back, (0, 1]."""
    convention: Convention | str | None = None
    """Which timestep the network is told while inverting."""
    inversion_guidance_scale: float | None = None
    """Classifier-free guidance weight while inverting; 1 is off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentInjection:
    """Another picture's content in the look of the source (Jeong, Kwon, Uh, WACV 2024): the network's inner activations
    are mixed with those it had while the content was inverted. Needs no target prompt.

    ``steps``, ``strength``, ``convention`` and ``inversion_guidance_scale`` are those of the source's inversion: leave
    them out where the source is an inversion or a generated picture.
    """

    content: "ImageLike | InversionHandle" = field(repr=False)
    """Whose content: a photo, or an inversion made with ``DdimInversion(features=...)`` that holds the sites."""
    content_fit: Fit | str | None = None
    """How a photo is brought to the source's size."""
    weight: float | None = None
    """Share of the content in the mix, [0, 1]: 0 draws the source again. Server: 0.3."""
    calibration: float | None = None
    """The paper's omega, [0, 1]: calibration of the skip connections; 0 is none. Server: 0."""
    region: ImageLike | None = field(default=None, repr=False)
    """Where: 8-bit grey, white takes the content; as large as the source, or as the model's picture of it.
    The network's later layers carry some of it beyond."""
    injection_end: float | None = None
    """Share of the noise schedule at which injection ends, [0, 1): less noisy steps are plain. Server: 0.4."""
    every: int | None = None
    """Content goes in at every so many steps, from the noisiest. Server: 1."""
    boosting_start: float | None = None
    """Share of the schedule from which on down fresh noise is added, [0, 1]. Server: 0."""
    interpolation: Interpolation | str | None = None
    """How activations are mixed. Server: slerp."""
    sites: Sequence[str] = ()
    """Where in the network: some of ``Model.feature_sites``. Server: mid."""
    steps: int | None = None
    """Steps of the whole schedule."""
    strength: float | None = None
    """Share of the schedule that is inverted, (0, 1]. Server: 1."""
    convention: Convention | str | None = None
    """Which timestep the network is told while inverting."""
    inversion_guidance_scale: float | None = None
    """Classifier-free guidance weight while inverting; 1 is off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disentangled:
    """Mix the texts before and after along the steps (Wu et al., CVPR 2023). Nothing is inverted.

    One of ``direction``, ``switch_step`` and ``weights`` says how. With a direction, empty prompts, guidance and
    sampler are the direction's.
    """

    direction: "Direction | str | None" = None
    """A direction learned before, or its name."""
    switch_step: int | None = None
    """The source prompt for so many steps, the target prompt after: no learning needed."""
    weights: Sequence[float] | None = None
    """One a step, noisiest first: 1 is the source prompt alone, 0 the target prompt alone."""
    scale: float | None = None
    """0 is no change, 1 as learned, up to 4; below 0 goes the other way, down to -2. Server: 1."""
    steps: int | None = None
    """Steps of the schedule; leave it out with a direction, and where the source is a generated picture."""
    sampler: Sampler | str | None = None
    """Server: the direction's, else DDIM."""


EditMethod = Edict | Ddim | SdEdit | DiffEdit | Disentangled | ContentInjection


# --- how to learn -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientLearning:
    """Adam on the loss of the decoded picture (Wu et al., CVPR 2023, section 4)."""

    optimization_steps: int | None = None
    """At most 200. Server: 10."""
    learning_rate: float | None = None
    """(0, 1]. Server: 0.05."""
    switch_step: int | None = None
    """The weights begin as 1 for so many steps. Server: two fifths of all."""
    late_weight: float | None = None
    """And as this for the others, [-2, 2]. Server: 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLearning:
    """The best of all pairs of the two: cheaper, without gradients, and most of the benefit."""

    switch_steps: Sequence[int] = ()
    """Numbers of steps that keep a weight of 1. Server: five between 20 and 60 % of all."""
    late_weights: Sequence[float] = ()
    """Weights of the steps after. Server: 0.2, 0 and -0.2."""


LearnMethod = GradientLearning | SearchLearning
