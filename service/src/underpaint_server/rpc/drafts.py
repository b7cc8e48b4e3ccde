"""An edit or an inversion on its way to a job: as it was asked for, and with what was fetched or decoded for it."""

from dataclasses import dataclass, field

from underpaint.v1 import types_pb2

from underpaint_server.jobs import EditMethod, Generated, InversionOptions, ModelInfo, Photo, Priority, Stored
from underpaint_server.rpc.fitting import Fitting


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
    """An edit, or the mask of one."""

    model: ModelInfo
    source: DraftSource
    inversion: InversionOptions | None
    """How to invert the source; None where nothing is, and for a named inversion, which knows itself."""
    method: EditMethod
    """A given mask or region is not in it yet."""
    content: Upload | Named | None
    """Whose content is injected, where the method does that."""
    mask: types_pb2.Image | None = field(repr=False)
    """That mask or region."""
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
class Injected:
    """The picture whose content an edit injects."""

    source: Photo | Stored
    inversion: InversionOptions
    """How it is or was inverted."""
    fitting: Fitting
    name: str
    """64 hexadecimal digits of the inversion, made or to be made; empty where it could not be stored."""


@dataclass(frozen=True, slots=True)
class Start:
    """The beginning of an edit."""

    source: Photo | Stored | Generated
    inversion: InversionOptions | None
    """How the source is or was inverted; None where nothing is."""
    fitting: Fitting
    name: str = ""
    """64 hexadecimal digits of the inversion, made or to be made; empty where there is none."""
    content: Injected | None = None
    """Where the method injects one."""

    @property
    def hit(self) -> bool:
        """Whether the latents came from the store."""
        return isinstance(self.source, Stored)
