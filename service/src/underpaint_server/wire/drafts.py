"""An edit or an inversion between request and job: as read from the request, and what was fetched or decoded for it."""

from dataclasses import dataclass, field

from underpaint.v1 import types_pb2
from underpaint.v1.inversion_service_pb2 import InversionParameters

from underpaint_server.jobs import EditOptions, Generated, InversionOptions, ModelInfo, Photo, Priority, Stored
from underpaint_server.wire.fitting import Fitting


@dataclass(frozen=True, slots=True)
class Upload:
    """An image uploaded in the request, still encoded."""

    image: types_pb2.Image = field(repr=False)


@dataclass(frozen=True, slots=True)
class StoredSource:
    """A stored inversion named by the request."""

    inversion: str
    """64 hexadecimal digits."""
    parameters: InversionParameters = field(default_factory=InversionParameters)
    """How the request says that it was made; fields that are set must be its own."""


DraftSource = Upload | StoredSource | Generated
"""What an edit starts from, before anything is fetched or decoded."""


@dataclass(frozen=True, slots=True)
class EditDraft:
    """An edit or a mask computation as read from the request, with all defaults filled in."""

    model: ModelInfo
    source: DraftSource
    inversion: InversionOptions | None
    """How the source is inverted, or would be if it is generated. None where the method has no inversion, and for a
    stored inversion, which has its own options."""
    method: EditOptions
    """Without what is decoded or fetched later, such as a given mask."""
    target_prompt: str
    negative_prompt: str
    guidance_scale: float | None
    """None means the guidance scale of the inversion."""
    seed: int
    media_type: str
    """Of the result: ``image/png``, ``image/jpeg`` or ``image/webp``."""
    priority: Priority


@dataclass(frozen=True, slots=True)
class InvertDraft:
    """An inversion as read from the request, with all defaults filled in."""

    model: ModelInfo
    image: types_pb2.Image = field(repr=False)
    options: InversionOptions
    verify: bool
    """Whether to run the round trip and measure its error."""
    priority: Priority


@dataclass(frozen=True, slots=True)
class EditCompanion:
    """The second image of an edit, fetched or decoded, for methods that take one."""

    source: Photo | Stored
    """Pixels to invert, or the stored inversion."""
    inversion: InversionOptions
    """How the image is or was inverted."""
    fitting: Fitting
    name: str
    """The inversion's name, 64 hexadecimal digits; empty if it could not be stored."""


@dataclass(frozen=True, slots=True)
class EditSource:
    """What an edit starts from, fetched or decoded."""

    source: Photo | Stored | Generated
    inversion: InversionOptions | None
    """How the source is or was inverted; None if nothing is inverted."""
    fitting: Fitting
    name: str = ""
    """The inversion's name, 64 hexadecimal digits; empty if there is none or it could not be stored."""
    companion: EditCompanion | None = None
    """The second image, if the method takes one."""
