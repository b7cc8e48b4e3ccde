"""The nouns the device knows: the questions an algorithm can ask, one row each.

An algorithm is a generator: it yields a group (a list of rows), is sent the list of their answers in the same order,
and returns its result. It never sees the network, the batch its rows travelled in, or other jobs.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")

FeatureMap = Callable[[Tensor], Tensor]
"""An activation (c, h, w), float32, to another of its shape."""


@dataclass(frozen=True, slots=True, eq=False)
class Denoise:
    """Noise prediction of one latent at one timestep under one text. Answered by ``noise_pred`` (c, h, w), float64,
    as epsilon whatever the network itself predicts; by :class:`Captured` where something is captured."""

    latents: Tensor
    """(c, h, w), float64."""
    timestep: int
    """0 .. num_train_timesteps - 1; what the network is told."""
    alpha_bar: float
    """Cumulative alpha of the level the latents are at, for networks that predict something else than epsilon."""
    prompt_embeds: Tensor
    """(tokens, width), the network's dtype."""
    capture: tuple[str, ...] = ()
    """Feature sites whose activation is wanted: "mid" (h, the middle block's output), "up_0", "up_1", ... (the up
    blocks'). What a map puts in its place is not seen at that site, but at the later ones."""
    maps: Mapping[str, FeatureMap] = field(default_factory=dict)
    """Feature site -> what this row's own activation becomes there before the rest of the network runs."""


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """Answer of a :class:`Denoise` that captures."""

    noise_pred: Tensor
    """(c, h, w), float64."""
    features: Mapping[str, Tensor]
    """Feature site -> (c, h, w) of that site, float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Encode:
    """An image into the autoencoder. Answered by latents (c, h, w), float64, scaled: the distribution's mean."""

    image: Tensor
    """(3, height, width), float32, [-1, 1]."""


@dataclass(frozen=True, slots=True, eq=False)
class Decode:
    """Latents out of the autoencoder. Answered by an image (3, height, width), float32, [-1, 1]."""

    latents: Tensor
    """(c, h, w), float64."""


@dataclass(frozen=True, slots=True, eq=False)
class PullBack:
    """Vector-Jacobian product of the :class:`Denoise` of the same fields. Answered by :class:`Pulled`."""

    latents: Tensor
    """(c, h, w), float64."""
    timestep: int
    alpha_bar: float
    prompt_embeds: Tensor
    """(tokens, width), the network's dtype."""
    cotangent: Tensor
    """(c, h, w), float64: derivative of the loss by the noise prediction."""


@dataclass(frozen=True, slots=True, eq=False)
class Pulled:
    """Answer of :class:`PullBack`."""

    latents: Tensor
    """(c, h, w), float64: derivative of the loss by the latents."""
    prompt_embeds: Tensor
    """(tokens, width), float64: derivative of the loss by the text's embedding."""


@dataclass(frozen=True, slots=True, eq=False)
class PullBackDecode:
    """Vector-Jacobian product of the :class:`Decode` of these latents, before its result is cut to [-1, 1]. Answered by
    the derivative of the loss by the latents, (c, h, w), float64."""

    latents: Tensor
    """(c, h, w), float64."""
    cotangent: Tensor
    """(3, height, width), float32: derivative of the loss by the image."""


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """How well an image is an edit of a reference from one text to another. Answered by :class:`Scored`."""

    image: Tensor
    """(3, height, width), float32, [-1, 1]."""
    reference: Tensor
    """(3, height, width), float32, [-1, 1]: the unedited picture."""
    source_text: str
    target_text: str
    content_weight: float
    """Of the content loss in the sum, >= 0."""
    gradient: bool
    """Whether the derivative by the image is wanted."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Answer of :class:`Score`."""

    directional: float
    """1 - cosine of the change of the image and the change of the text in CLIP's space, [0, 2]."""
    content: float
    """Distance of the two images' features, >= 0."""
    gradient: Tensor | None
    """(3, height, width), float32: derivative of ``directional + content_weight * content`` by the image."""


@dataclass(frozen=True, slots=True)
class Embed:
    """A text's embedding. Answered by :class:`Embedded`."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """Answer of :class:`Embed`."""

    prompt_embeds: Tensor
    """(tokens, width), the network's dtype."""
    dropped: str
    """The part of the text beyond the encoder's context; empty when all was read."""


Row = Denoise | PullBack | Encode | Decode | PullBackDecode | Score | Embed


def is_network_row(kind: type[Row]) -> bool:
    """Whether rows of this kind evaluate the denoising network: what plans, progress, usage, pace and metrics count."""
    return issubclass(kind, Denoise | PullBack)


Steps = Generator[Sequence[Row], Sequence[Any], T]
"""What every algorithm is: yields groups of rows, is sent their answers, returns T."""


@dataclass(frozen=True, slots=True)
class Key:
    """Rows with equal keys may share a forward pass."""

    model: str
    kind: type[Row]
    shape: tuple[int, ...]
    """Of the latents or the image; () for text."""
    batch_class: int | None
    """Rows that the pass must have, or None for any number."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of one kind and shape that share one forward pass."""

    rows: Sequence[Row]
    size: int
    """Rows of the pass, padding counted; never less than ``len(rows)``."""
