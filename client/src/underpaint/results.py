"""What calls return: frozen values. Images are decoded at the first access."""

import os
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from underpaint import images
from underpaint.choices import Fit
from underpaint.errors import UnderpaintError
from underpaint.methods import EDIT_METHODS, InversionMethod
from underpaint.resources import Direction as Direction
from underpaint.resources import InversionHandle as InversionHandle
from underpaint.resources import Origin as Origin
from underpaint.v1 import edit_service_pb2, types_pb2

if TYPE_CHECKING:
    from PIL import Image


class Phase(StrEnum):
    """The part of the work that is running."""

    UNKNOWN = "unknown"
    """A phase that this client does not know."""
    QUEUED = "queued"
    """Waiting in the queue."""
    ENCODING = "encoding"
    """Image and prompts are encoded."""
    INVERTING = "inverting"
    """From the image to noise."""
    MASKING = "masking"
    """DiffEdit's mask is computed."""
    DENOISING = "denoising"
    """From noise to the result."""
    DECODING = "decoding"
    """The result is decoded."""
    OPTIMIZING = "optimizing"
    """A direction is learned."""


class ExactBatching(StrEnum):
    """In which passes of the network equal requests give equal bits on the server that answered."""

    UNKNOWN = "unknown"
    """The model is not loaded, or the server is of a version that does not say it or says something unknown."""
    ANY_SIZE = "any_size"
    """In passes of any number of rows."""
    ROW_BY_ROW = "row_by_row"
    """In passes of any number of rows, because each row is computed by itself."""
    FIXED_SIZE = "fixed_size"
    """In passes of a fixed number of rows, ``Model.batch_class``."""
    INEXACT = "inexact"
    """In none: no inversion is exact."""


class ModelState(StrEnum):
    """State of a model on the server that answered."""

    UNKNOWN = "unknown"
    """A state that this client does not know."""
    AVAILABLE = "available"
    """Configured, not in memory."""
    LOADING = "loading"
    """Its weights are being read."""
    READY = "ready"
    """It accepts requests."""
    DRAINING = "draining"
    """It finishes its requests and accepts no more."""
    FAILED = "failed"
    """Loading failed; ``Model.error`` has the reason."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a request at one moment. Some are skipped when the callback is slow."""

    phase: Phase
    step: int
    """Steps finished in this phase."""
    total_steps: int
    """Steps in this phase."""
    fraction: float
    """Share of the whole request that is done, 0 to 1, never decreasing."""
    queue_position: int
    """Position in the queue: 1 is the next to start, 0 is not in the queue."""
    eta_s: float | None
    """Estimated seconds to the result; None while there is no estimate."""
    loss: float | None = None
    """Loss of the mixing weights that were evaluated last; None unless a direction is being learned."""


@dataclass(frozen=True)
class Preview:
    """A rough image of an edit that is running."""

    step: int
    """The denoising step after which it was made."""
    image_bytes: bytes = field(repr=False)
    """JPEG."""

    @cached_property
    def image(self) -> "Image.Image":
        """The preview, decoded."""
        return images.decoded(self.image_bytes)


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    left: int
    """Distance of the left edge from that of the image."""
    top: int
    """Distance of the top edge from that of the image."""
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Fitting:
    """How a photo was brought to the model's size."""

    fit: Fit | None
    """None if the photo had that size already."""
    source_size: tuple[int, int]
    """(width, height) of the photo, after EXIF orientation."""
    size: tuple[int, int]
    """(width, height) of the result."""
    source_box: Box
    """Part of the photo that was used."""
    box: Box
    """Position of that part in the result."""

    def to_source(self, x: float, y: float) -> tuple[float, float]:
        """Coordinates in the photo of a point (x, y) of the result, both in pixels from the top left corner."""
        x_scale = self.source_box.width / self.box.width
        y_scale = self.source_box.height / self.box.height
        return self.source_box.left + (x - self.box.left) * x_scale, self.source_box.top + (y - self.box.top) * y_scale


@dataclass(frozen=True, slots=True)
class Notice:
    """A warning about a result."""

    reason: str
    """PROMPT_TRUNCATED, PROMPT_SYNTAX, PROMPT_UNUSED, NOISE_TOO_LOW, INVERSION_INEXACT, MASK_EMPTY, MASK_FULL, or one
    that a later server adds."""
    message: str
    """Explanation to show to a user."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost."""

    queue_time_s: float
    """Seconds from admission to the first step."""
    compute_time_s: float
    """Seconds on the device; a batch counts in full for each of its requests."""
    network_evaluations: int
    """U-Net evaluations that the result needed, those for guidance included."""
    mean_batch_size: float
    """Mean number of requests in a batch, this one included."""
    inversion_cache_hit: bool
    """Whether the inversion was already in the server's store."""
    reused_evaluations: int = 0
    """Those of ``network_evaluations`` that were not computed for this request, because another one needed the same."""


@dataclass(frozen=True, slots=True)
class InversionParameters:
    """Settings of an inversion, with defaults filled in."""

    method: InversionMethod | None
    """None for a method that this client does not know."""
    steps: int
    """Steps of the whole schedule."""
    strength: float
    """Share of the schedule that was inverted, (0, 1]."""
    guidance_scale: float
    """Classifier-free guidance weight; 1 is off."""
    source_prompt: str
    """Text that describes the photo."""


@dataclass(frozen=True)
class Inversion(InversionHandle):
    """A stored inversion."""

    model: str
    """"models/{id}"."""
    parameters: InversionParameters
    width: int
    """Width in pixels of the image that was inverted."""
    height: int
    """Its height in pixels."""
    size_bytes: int
    """Size in the server's store."""
    reconstruction_psnr_db: float | None
    """Peak signal-to-noise ratio of the reconstruction in dB; None without ``verify``."""
    reconstruction_max_abs_error: float | None
    """Largest absolute error of a latent after inverting and denoising; None without ``verify``."""
    create_time: datetime | None
    """UTC."""
    expire_time: datetime | None
    """When the server may delete it, UTC; each use postpones this."""
    fitting: Fitting | None
    """How the photo was brought to the model's size."""
    usage: Usage | None = None
    """What making it cost; None when it was only fetched."""
    notices: tuple[Notice, ...] = ()
    """Warnings."""


@dataclass(frozen=True)
class Resolved:
    """A request with every default filled in: keep it to repeat the edit.

    Its source is an inversion if the method inverts the photo, else the image at the model's size.
    """

    message: edit_service_pb2.EditRequest = field(repr=False)
    """The message of the contract."""
    origin: Origin | None = field(default=None, repr=False, compare=False)
    """The photo behind its inversion, if this client has it; not part of the JSON."""
    second_image: types_pb2.Image | None = field(default=None, repr=False, compare=False)
    """The method's second image, such as the content to inject, if this client has it; not part of the JSON."""

    @property
    def seed(self) -> int:
        """Seed of the noise: the generated source's if the method itself draws no noise, else the edit's."""
        method = EDIT_METHODS.get(self.message.WhichOneof("method") or "")
        draws_noise = method is None or method._draws_noise(self.message)
        generated = self.message.WhichOneof("source") == "generated"
        return self.message.generated.seed if generated and not draws_noise else self.message.seed

    def to_dict(self) -> dict[str, Any]:
        """The message as dicts and lists, with the field names of the contract."""
        from google.protobuf.json_format import MessageToDict

        return MessageToDict(self.message, preserving_proto_field_name=True)

    def to_json(self) -> str:
        """The message as JSON; ``from_json`` reads it."""
        from google.protobuf.json_format import MessageToJson

        return MessageToJson(self.message, preserving_proto_field_name=True, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read JSON that ``to_json`` wrote; ValueError for any other text."""
        from google.protobuf.json_format import Parse, ParseError

        try:
            return cls(Parse(text, edit_service_pb2.EditRequest()))
        except ParseError as error:
            raise ValueError(
                f"text is not a resolved request in JSON, as Resolved.to_json writes it: {error}"
            ) from error

    def __str__(self) -> str:
        return self.to_json()


@dataclass(frozen=True)
class _Answer:
    resolved: Resolved
    """The request with every default filled in; ``client.repeat(resolved)`` returns the same bytes."""
    inversion: InversionHandle | None
    """Inversion that the edit started from: as the source of the next edit it saves inverting the photo again."""
    usage: Usage
    """What the request cost."""
    fitting: Fitting | None
    """How the photo was brought to the model's size; None when no photo was sent."""
    notices: tuple[Notice, ...]
    """Warnings."""


@dataclass(frozen=True)
class Edited(_Answer):
    """An edited image."""

    image_bytes: bytes = field(repr=False)
    """The image, encoded as ``media_type``."""
    media_type: str
    """image/png, image/jpeg or image/webp."""
    mask_bytes: bytes | None = field(repr=False)
    """Mask that was used: 8-bit grey PNG, white was edited. None if the method has no mask."""

    @cached_property
    def image(self) -> "Image.Image":
        """The image, decoded."""
        return images.decoded(self.image_bytes)

    @cached_property
    def mask(self) -> "Image.Image | None":
        """The mask that was used, mode L, white was edited; None if the method has no mask."""
        return images.decoded(self.mask_bytes) if self.mask_bytes is not None else None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the image; the suffix .png, .jpg, .jpeg or .webp chooses the format, ValueError for others."""
        return images.save(self.image_bytes, self.media_type, path)

    def _repr_png_(self) -> bytes | None:
        return self.image_bytes if self.media_type == "image/png" else None


@dataclass(frozen=True)
class Mask(_Answer):
    """The mask that DiffEdit computes."""

    mask_bytes: bytes = field(repr=False)
    """8-bit grey PNG of the model's size, white is edited; an argument for ``DiffEdit(mask=...)``."""
    difference: "memoryview[float]" = field(repr=False)
    """Normalised difference before the threshold: float32, (height, width) of the latents; for ``numpy.asarray``."""
    coverage: float
    """Share of the mask's pixels that are white, 0 to 1."""

    @cached_property
    def image(self) -> "Image.Image":
        """The mask, decoded, mode L, white is edited."""
        return images.decoded(self.mask_bytes)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the mask; the suffix .png, .jpg, .jpeg or .webp chooses the format, ValueError for others."""
        return images.save(self.mask_bytes, "image/png", path)

    def _repr_png_(self) -> bytes:
        return self.mask_bytes


@dataclass(frozen=True, slots=True)
class Operation:
    """State of an operation that learns a direction, at one moment."""

    name: str
    """"operations/{id}"."""
    done: bool
    """Whether it has ended, with a direction or with an error."""
    progress: Progress | None
    """None if it ended with an error."""
    direction: Direction | None
    """The learned direction; None before the end and after an error."""
    error: UnderpaintError | None
    """The error that ended it, :class:`Cancelled` after a cancel; None without one."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of requests to a model."""

    max_image_bytes: int
    """Largest size of an encoded image."""
    max_image_pixels: int
    """Largest width times height of an image."""
    max_steps: int
    """Largest number of steps of a schedule."""
    max_batch_size: int
    """Largest number of requests in a batch."""
    max_prompt_chars: int
    """Largest number of characters of a prompt."""
    size_multiple: int
    """Width and height of a generated image must be multiples of this, in pixels."""
    max_mask_samples: int
    """Largest ``DiffEdit.samples``."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the server."""

    name: str
    """"models/{id}"."""
    state: ModelState
    digest: str
    """Digest of the weights."""
    methods: tuple[str, ...]
    """Names of the edit methods that it supports, such as "edict"."""
    limits: Limits
    """Limits of requests."""
    error: str
    """Why loading failed; empty in any other state."""
    width: int
    """Width in pixels of the images that it was trained on."""
    height: int
    """Their height in pixels."""
    default_steps: int
    """Steps of the schedule when a request names none."""
    feature_sites: tuple[str, ...]
    """Sites whose activations can be stored and injected, such as "mid"."""
    prompt_tokens: int
    """Tokens of a prompt that are used, the rest is cut; 0 for a model without text: leave its prompts empty."""
    exact_batching: ExactBatching
    """In which passes equal requests give equal bits, at the model's own image size."""
    batch_class: int
    """Rows of each pass where that number is fixed; 0 where it is not."""
    backend: str
    """What computes its networks, such as "torch"; empty until it is loaded."""
