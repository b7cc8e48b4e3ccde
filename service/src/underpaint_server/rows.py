"""Rows: what a method asks the device to compute, and the results.

A method is a generator: it yields a group (a list of rows), is sent the list of their results in the same order, and
returns its own result. It does not see the network, the batches that its rows are computed in, or other jobs.
"""

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")

FeatureMap = Callable[[Tensor], Tensor]
"""Function from an activation (c, h, w), float32, to one of the same shape and dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class Denoise:
    """Noise prediction for one image's latents, one timestep and one prompt.

    Its result is the noise prediction (c, h, w), float64, converted to epsilon if the network predicts v or x0; if
    ``capture`` is not empty it is :class:`Captured`.
    """

    latents: Tensor
    """(c, h, w), float64."""
    timestep: int
    """The timestep passed to the network, 0 .. num_train_timesteps - 1."""
    alpha_bar: float
    """alpha_bar of the latents, (0, 1]; needed where the network predicts v or x0. See ``diffusion.schedule.Level``."""
    prompt_embeds: Tensor
    """(tokens, width), the network's dtype."""
    capture: tuple[str, ...] = ()
    """Feature sites whose activations are in the result: "mid" is the output of the middle block, "up_0", "up_1", ...
    are the outputs of the up blocks. An activation is captured before this site's map is applied and after those of
    earlier sites."""
    maps: Mapping[str, FeatureMap] = field(default_factory=dict)
    """Feature site -> function applied to this row's activation there, before the rest of the network runs."""
    name: Hashable = None
    """See :func:`named`; None for a row without a name."""


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """Result of a :class:`Denoise` with ``capture``."""

    noise_pred: Tensor
    """(c, h, w), float64."""
    features: Mapping[str, Tensor]
    """Feature site -> activation (c, h, w), float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Encode:
    """Encode an image with the autoencoder. Its result is latents (c, h, w), float64: the mean of the distribution,
    times the model's scaling factor."""

    image: Tensor
    """(3, height, width), float32, [-1, 1]."""
    name: Hashable = None
    """See :func:`named`; None for a row without a name."""


@dataclass(frozen=True, slots=True, eq=False)
class Decode:
    """Decode latents with the autoencoder. Its result is an image (3, height, width), float32, [-1, 1]."""

    latents: Tensor
    """(c, h, w), float64."""


@dataclass(frozen=True, slots=True, eq=False)
class PullBack:
    """Vector-Jacobian product of the :class:`Denoise` with the same fields. Its result is :class:`Pulled`."""

    latents: Tensor
    """(c, h, w), float64."""
    timestep: int
    alpha_bar: float
    prompt_embeds: Tensor
    """(tokens, width), the network's dtype."""
    cotangent: Tensor
    """(c, h, w), float64: gradient of the loss with respect to the noise prediction."""


@dataclass(frozen=True, slots=True, eq=False)
class Pulled:
    """Result of :class:`PullBack`."""

    latents: Tensor
    """(c, h, w), float64: gradient with respect to the latents."""
    prompt_embeds: Tensor
    """(tokens, width), float64: gradient with respect to the prompt embeddings."""


@dataclass(frozen=True, slots=True, eq=False)
class PullBackDecode:
    """Vector-Jacobian product of the :class:`Decode` of these latents, its clamp to [-1, 1] included.

    Its result is the gradient of the loss with respect to the latents, (c, h, w), float64.
    """

    latents: Tensor
    """(c, h, w), float64."""
    cotangent: Tensor
    """(3, height, width), float32: gradient of the loss with respect to the image."""


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """Loss of an edited image, given the unedited one and the two prompts (Wu et al., CVPR 2023, section 4.2). Its
    result is :class:`Scored`."""

    image: Tensor
    """(3, height, width), float32, [-1, 1]."""
    reference: Tensor
    """(3, height, width), float32, [-1, 1]: the unedited image."""
    source_text: str
    target_text: str
    content_weight: float
    """Factor of the content loss in the sum, >= 0."""
    gradient: bool
    """Whether the gradient with respect to the image is computed."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Result of :class:`Score`."""

    directional: float
    """1 - cosine similarity of the image change and the text change in CLIP's embedding space, [0, 2]."""
    content: float
    """Distance of the features of the two images, >= 0."""
    gradient: Tensor | None
    """(3, height, width), float32: gradient of ``directional + content_weight * content`` with respect to the image;
    None where it was not asked for."""


@dataclass(frozen=True, slots=True)
class Embed:
    """Encode a prompt. Its result is :class:`Embedded`."""

    text: str

    @property
    def name(self) -> Hashable:
        """The text; see :func:`named`."""
        return self.text


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """Result of :class:`Embed`."""

    prompt_embeds: Tensor
    """(tokens, width), the network's dtype."""
    dropped: str
    """The end of the text that did not fit the encoder's context; empty if all of it did."""


Row = Denoise | PullBack | Encode | Decode | PullBackDecode | Score | Embed


def is_network_row(kind: type[Row]) -> bool:
    """Whether rows of this kind evaluate the denoising network. Plans, progress, usage, pace and metrics count only
    these network rows."""
    return issubclass(kind, Denoise | PullBack)


Steps = Generator[Sequence[Row], Sequence[Any], T]
"""The type of every method and program: a generator that yields groups of rows, is sent their results and returns T."""


def named(name: Hashable, steps: Steps[T]) -> Steps[T]:
    """Run ``steps`` with a name for each of its rows: ``name``, the number of the group and the place in it.

    Rows of one model whose names are equal have equal inputs, so the engine computes one of them for all, whichever
    jobs they belong to. ``name`` must therefore say all that decides the rows of ``steps``. It is made of what the rows
    are computed from, and not of their tensors, which may still be being computed. Rows with maps get no name.
    """
    with closing(steps):
        try:
            group = next(steps)
            for number in count():
                rows = [_named(row, (name, number, place)) for place, row in enumerate(group)]
                group = steps.send((yield rows))
        except StopIteration as end:
            result: T = end.value
    return result


def _named(row: Row, name: Hashable) -> Row:
    return replace(row, name=name) if isinstance(row, Encode) or (isinstance(row, Denoise) and not row.maps) else row


@dataclass(frozen=True, slots=True)
class Key:
    """Rows with equal keys may share a forward pass."""

    model: str
    kind: type[Row]
    shape: tuple[int, ...]
    """Of the latents or the image; () for text."""
    batch_class: int | None
    """Batch class: number of rows that the pass must have; None for any number."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of one kind and shape that share one forward pass."""

    rows: Sequence[Row]
    size: int
    """Number of rows of the pass, padding included; at least ``len(rows)``."""
