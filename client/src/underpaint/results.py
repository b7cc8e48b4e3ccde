"""What comes back. Frozen values; pictures are decoded when they are first looked at."""

import os
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from underpaint import images
from underpaint.errors import UnderpaintError
from underpaint.methods import Fit, InversionMethod, Sampler
from underpaint.v1 import edit_service_pb2, inversion_service_pb2, types_pb2

if TYPE_CHECKING:
    from PIL import Image


class Phase(StrEnum):
    """Which part of the work runs."""

    UNKNOWN = "unknown"
    """Newer than this client."""
    QUEUED = "queued"
    ENCODING = "encoding"
    INVERTING = "inverting"
    MASKING = "masking"
    DENOISING = "denoising"
    DECODING = "decoding"
    OPTIMIZING = "optimizing"


class ModelState(StrEnum):
    """State of a model on the server that answered."""

    UNKNOWN = "unknown"
    """Newer than this client."""
    AVAILABLE = "available"
    """Configured, not in memory."""
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    """``Model.error`` says why."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A snapshot; a later one supersedes it, and some may be skipped."""

    phase: Phase
    step: int
    """Steps finished in this phase."""
    total_steps: int
    """Steps in this phase."""
    fraction: float
    """Share of the whole request that is done, 0 to 1, never falling."""
    queue_position: int
    """Requests ahead while queued."""
    eta_s: float | None
    """Estimated seconds to the result; None while there is no estimate."""
    loss: float | None = None
    """While a direction is learned: the loss of the last weights that were measured."""


@dataclass(frozen=True)
class Preview:
    """A rough look at the picture in the making."""

    step: int
    """The step it shows."""
    image_bytes: bytes = field(repr=False)
    """JPEG."""

    @cached_property
    def image(self) -> "Image.Image":
        """The look, decoded."""
        return images.decoded(self.image_bytes)


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Fitting:
    """What was done to a photo to bring it to the model's size."""

    fit: Fit | None
    """None when it had the size already."""
    source_size: tuple[int, int]
    """(width, height) of the photo, after EXIF orientation."""
    size: tuple[int, int]
    """(width, height) of the result."""
    source_box: Box
    """Part of the photo that is used."""
    box: Box
    """Where that part lies in the result."""

    def to_source(self, x: float, y: float) -> tuple[float, float]:
        """The photo's coordinates of a point of the result, both in pixels from the top left corner."""
        across = self.source_box.width / self.box.width
        down = self.source_box.height / self.box.height
        return self.source_box.left + (x - self.box.left) * across, self.source_box.top + (y - self.box.top) * down


@dataclass(frozen=True, slots=True)
class Notice:
    """Something to know that is no error."""

    reason: str
    """PROMPT_TRUNCATED, MASK_EMPTY or MASK_FULL."""
    message: str
    """For people."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost."""

    queue_time_s: float
    """From admission to the first step."""
    compute_time_s: float
    """On the device; time shared with other requests counts once for each."""
    network_evaluations: int
    """U-Net evaluations, guidance branches counted."""
    mean_batch_size: float
    """Mean number of requests that shared a step, this one counted."""
    inversion_cache_hit: bool
    """Whether the inversion was in the store already."""


@dataclass(frozen=True, slots=True)
class InversionParameters:
    """What decided an inversion, defaults filled in."""

    method: InversionMethod
    steps: int
    strength: float
    guidance_scale: float
    source_prompt: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Enough to make an inversion again when the server has let it go."""

    image: types_pb2.Image
    parameters: inversion_service_pb2.InversionParameters
    model: str


@dataclass(frozen=True)
class InversionHandle:
    """The name of an inversion, to edit from. One made from a photo by this client is made again when it expired."""

    name: str
    """"inversions/{sha256}"."""
    origin: Origin | None = field(default=None, repr=False, compare=False, kw_only=True)
    """The photo, when this client had it."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Inversion(InversionHandle):
    """A stored inversion."""

    model: str
    """"models/{id}"."""
    parameters: InversionParameters
    width: int
    """Pixels of the picture that was inverted."""
    height: int
    size_bytes: int
    """What it takes in the store."""
    reconstruction_psnr_db: float | None
    """Peak signal-to-noise ratio of the round trip, when it was asked for."""
    reconstruction_max_abs_error: float | None
    """Largest absolute difference of any latent after the round trip, when it was asked for."""
    create_time: datetime | None
    expire_time: datetime | None
    """When it may vanish; using it moves this forward."""
    fitting: Fitting | None
    usage: Usage | None = None
    """What making it cost; None when it was only looked up."""
    notices: tuple[Notice, ...] = ()


@dataclass(frozen=True)
class Resolved:
    """A request with every default filled in: what to keep to be able to repeat it.

    It names its inversion instead of holding a photo; pixels are in it only where no inversion stands for them.
    """

    message: edit_service_pb2.EditRequest = field(repr=False)
    """The message itself."""
    origin: Origin | None = field(default=None, repr=False, compare=False)
    """The photo behind its inversion, when this client had it; lost in JSON."""

    @property
    def seed(self) -> int:
        """Seed of the noise that was drawn: a generated picture's where the edit itself draws none, else the edit's."""
        source, method = self.message.WhichOneof("source"), self.message.WhichOneof("method")
        plain = method == "content_injection" and not self.message.content_injection.boosting_start
        drawn = source == "generated" and (method in ("ddim", "edict", "disentangled") or plain)
        return self.message.generated.seed if drawn else self.message.seed

    def to_dict(self) -> dict[str, Any]:
        """As plain values, in the field names of the contract."""
        from google.protobuf.json_format import MessageToDict

        return MessageToDict(self.message, preserving_proto_field_name=True)

    def to_json(self) -> str:
        """As JSON; ``from_json`` reads it back."""
        from google.protobuf.json_format import MessageToJson

        return MessageToJson(self.message, preserving_proto_field_name=True, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote. Raises ValueError when it is something else."""
        from google.protobuf.json_format import Parse, ParseError

        try:
            return cls(Parse(text, edit_service_pb2.EditRequest()))
        except ParseError as error:
            raise ValueError(f"not a resolved request: {error}") from error

    def __str__(self) -> str:
        return self.to_json()


@dataclass(frozen=True)
class _Answer:
    resolved: Resolved
    """The request with every default filled in; ``client.repeat(resolved)`` gives the same bytes again."""
    inversion: InversionHandle | None
    """What it started from: the next edit of this photo is cheaper from here."""
    usage: Usage
    fitting: Fitting | None
    """How the photo was brought to the model's size; None when no photo was sent."""
    notices: tuple[Notice, ...]


@dataclass(frozen=True)
class Edited(_Answer):
    """An edited picture."""

    image_bytes: bytes = field(repr=False)
    """Encoded picture, as ``media_type`` says."""
    media_type: str
    """Such as image/png."""
    mask_bytes: bytes | None = field(repr=False)
    """8-bit grey PNG, white was changed; None when the method has no mask."""

    @cached_property
    def image(self) -> "Image.Image":
        """The picture."""
        return images.decoded(self.image_bytes)

    @cached_property
    def mask(self) -> "Image.Image | None":
        """The mask that was used, white was changed."""
        return images.decoded(self.mask_bytes) if self.mask_bytes is not None else None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the picture; the suffix chooses .png, .jpg, .jpeg or .webp."""
        return images.save(self.image_bytes, self.media_type, path)

    def _repr_png_(self) -> bytes | None:
        return self.image_bytes if self.media_type == "image/png" else None


@dataclass(frozen=True)
class Mask(_Answer):
    """Where DiffEdit would change a picture."""

    mask_bytes: bytes = field(repr=False)
    """8-bit grey PNG, white may change; can be given to ``DiffEdit(mask=...)``."""
    difference: "memoryview[float]" = field(repr=False)
    """The difference before the cut: float32, (height, width) at latent resolution; ``numpy.asarray`` takes it."""
    coverage: float
    """Share of pixels that are white, 0 to 1."""

    @cached_property
    def image(self) -> "Image.Image":
        """The mask, mode L, white may change."""
        return images.decoded(self.mask_bytes)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the mask; the suffix chooses .png, .jpg, .jpeg or .webp."""
        return images.save(self.mask_bytes, "image/png", path)

    def _repr_png_(self) -> bytes:
        return self.mask_bytes


@dataclass(frozen=True)
class Direction:
    """A learned edit, for ``Disentangled(direction=...)``."""

    name: str
    """"directions/{id}"."""
    display_name: str
    model: str
    """"models/{id}"; it works with these weights alone."""
    model_digest: str
    source_prompt: str
    """Text before."""
    target_prompt: str
    """Text after."""
    steps: int
    """Of the schedule it was learned for; an edit has as many."""
    weights: tuple[float, ...] = field(repr=False)
    """One a step, noisiest first: 1 is the source prompt alone, 0 the target prompt alone."""
    sampler: Sampler
    guidance_scale: float
    content_features: str
    """What kept the content while learning: vae or vgg16."""
    method: str
    """How it was learned: gradient or search; empty if that is newer than this client."""
    losses: tuple[float, ...] = field(repr=False)
    """Before each optimiser step and after the last, or of each candidate; the weights are those of the smallest."""
    example_count: int
    """Pictures it was learned on."""
    create_time: datetime | None
    etag: str
    """Changes with the content; ``delete_direction(name, etag=...)`` deletes only this one."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Operation:
    """What learning has come to, at one moment."""

    name: str
    """"operations/{id}"."""
    done: bool
    progress: Progress | None
    """None where it ended with an error."""
    direction: Direction | None
    """What was learned, once it is."""
    error: UnderpaintError | None
    """What ended it instead; :class:`Cancelled` after a cancel."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests are held against."""

    max_image_bytes: int
    """Bytes of one encoded picture."""
    max_image_pixels: int
    """Pixels of one decoded picture."""
    max_steps: int
    """Steps of a schedule."""
    max_batch_size: int
    """Requests in one step's batch."""
    max_prompt_chars: int
    """Characters of a prompt."""
    size_multiple: int
    """Sides of a generated picture are multiples of this, in pixels."""
    max_mask_samples: int
    """Noise samples of one mask."""


@dataclass(frozen=True, slots=True)
class Model:
    """One set of weights that the server has."""

    name: str
    """"models/{id}"."""
    state: ModelState
    digest: str
    """Digest of the weights."""
    methods: tuple[str, ...]
    """Edit methods it can run, such as "edict"."""
    limits: Limits
    error: str
    """Why it failed, when it did."""
    width: int
    """Pixels the model was made for."""
    height: int
    default_steps: int
    """Steps of a schedule when a request names none."""
    feature_sites: tuple[str, ...]
    """Where activations can be kept and injected, such as "mid"."""
    prompt_tokens: int
    """Tokens of a prompt that are read; 0 for a model that reads no text: leave its prompts empty."""
