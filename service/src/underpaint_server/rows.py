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


Row = Denoise | Encode | Decode | Embed
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
