"""An edit or an inversion on its way to a job: as the request says it, and with what was fetched or decoded for it."""

from dataclasses import dataclass, field

from underpaint.v1 import types_pb2

from underpaint_server.jobs import EditOptions, Generated, InversionOptions, ModelInfo, Photo, Priority, Stored
from underpaint_server.wire.fitting import Fitting


@dataclass(frozen=True, slots=True)
class Upload:
    """An image that came with the request."""

    image: types_pb2.Image = field(repr=False)


@dataclass(frozen=True, slots=True)
class Named:
    """An inversion that the store is asked for."""

    inversion: str
    """64 hexadecimal digits."""


DraftSource = Upload | Named | Generated


@dataclass(frozen=True, slots=True)
class EditDraft:
    """An edit, or the mask of one, as far as the request says it."""

    model: ModelInfo
    source: DraftSource
    inversion: InversionOptions | None
    """How to invert the source; None where nothing is inverted, and for a named inversion, which has its own."""
    method: EditOptions
    """Without what must be decoded or fetched, such as a given mask."""
    target_prompt: str
    negative_prompt: str
    guidance_scale: float | None
    """None takes the inversion's."""
    seed: int
    media_type: str
    priority: Priority


@dataclass(frozen=True, slots=True)
class InvertDraft:
    """An inversion."""

    model: ModelInfo
    image: types_pb2.Image = field(repr=False)
    options: InversionOptions
    verify: bool
    priority: Priority


@dataclass(frozen=True, slots=True)
class EditCompanion:
    """The second image of an edit, fetched or decoded."""

    source: Photo | Stored
    inversion: InversionOptions
    """How it is or was inverted."""
    fitting: Fitting
    name: str
    """64 hexadecimal digits of the inversion, made or to be made; empty where it could not be stored."""


@dataclass(frozen=True, slots=True)
class EditSource:
    """What an edit starts from, fetched or decoded."""

    source: Photo | Stored | Generated
    inversion: InversionOptions | None
    """How the source is or was inverted; None where nothing is inverted."""
    fitting: Fitting
    name: str = ""
    """64 hexadecimal digits of the inversion, made or to be made; empty where there is none."""
    companion: EditCompanion | None = None
    """Where the method takes something from a second image."""
