"""What ``wire.py`` may say of a method's message in an EditRequest, and of an inversion's in InversionParameters."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar, cast

from underpaint.v1 import types_pb2
from underpaint.v1.edit_service_pb2 import EditRequest
from underpaint.v1.inversion_service_pb2 import InversionParameters

from underpaint_server.jobs import (
    Direction,
    EditOptions,
    Inversion,
    InversionMethod,
    InversionOptions,
    ModelInfo,
    Photo,
    Picture,
    Stored,
)
from underpaint_server.methods.base import part
from underpaint_server.wire.drafts import DraftSource, EditCompanion, EditSource
from underpaint_server.wire.fitting import Fitting
from underpaint_server.wire.reader import Reader

Options = TypeVar("Options", bound=EditOptions)

DEFAULT_STRENGTH: Final = 0.8
"""Share of the schedule by which an image is inverted or noised unless the request names one."""


class Fetch(Protocol):
    """What a method may ask of the server's process while a request is read."""

    async def picture(self, image: types_pb2.Image, model: ModelInfo) -> tuple[Picture, Fitting]:
        """The pixels of an uploaded image as the model sees them. Raises ImageUndecodable, ImageTooLarge, QueueFull."""

    async def mask(self, image: types_pb2.Image, fitting: Fitting, path: str) -> Picture:
        """An uploaded mask; raises FieldInvalid at ``path`` where it does not fit the source, and as ``picture``."""

    async def inversion(self, name: str) -> tuple[Inversion, Fitting]:
        """A stored inversion. Raises InversionExpired, StoreCorrupt, StoreUnavailable."""

    async def inverted(
        self, model: ModelInfo, pixels: Picture, options: InversionOptions
    ) -> tuple[str, Photo | Stored]:
        """The name of these pixels' inversion, and the inversion if it is stored; else the pixels."""

    async def direction(self, name: str) -> Direction:
        """A stored direction. Raises DirectionNotFound, StoreCorrupt, StoreUnavailable."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What fields that all methods share mean where they are left out."""

    steps: int
    source_prompt: str = ""
    target_prompt: str = ""
    guidance_scale: float | None = None
    """None takes the method's."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a method may look at while its own message is read."""

    request: EditRequest
    reader: Reader
    found: Any
    """What the method's ``lookup`` returned; None without."""
    source: DraftSource
    inversion: InversionOptions | None
    """How the source will be inverted, where that is known yet."""
    defaults: Defaults


@dataclass(frozen=True, slots=True)
class Completing:
    """What a method may look at once its source is fetched."""

    request: EditRequest
    model: ModelInfo
    source: EditSource
    fetch: Fetch


@dataclass(frozen=True, slots=True, kw_only=True)
class Message(Generic[Options]):
    """One method's message. What is left out here, the method does not have."""

    read: Callable[[Reading], Options]
    """Its options, as far as the request says them. Violations are collected by the reader."""
    write: Callable[[EditRequest, Options, EditSource], None]
    """Its message with nothing left to default. The request's source is set already."""
    guidance_scale: float | None
    """Default guidance of the edit; None takes the inversion's."""
    inversion_strength: float = DEFAULT_STRENGTH
    """Default strength of the inversion that it starts from."""
    needs_target: bool = True
    """Whether a target prompt must be given. Where it need not, a generated source keeps its own prompt."""
    lookup: Callable[[EditRequest, Fetch], Awaitable[Any]] | None = None
    """Fetches what the request names and the reading depends on, before anything is read."""
    defaults: Callable[[EditRequest, Reader, Any], Defaults] | None = None
    """Where the message decides the defaults of shared fields; the last argument is what ``lookup`` returned."""
    check: Callable[[Reading, Options], None] | None = None
    """Raises what can be judged only when every single field is right."""
    complete: Callable[[Options, Completing], Awaitable[tuple[Options, EditCompanion | None]]] | None = None
    """The options with what had to be decoded or fetched, and the companion, when the source is known."""
    check_mask: Callable[[EditRequest], None] | None = None
    """For ComputeMask: raises FieldInvalid where the request leaves no mask to compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InversionMessage:
    """One inversion's message."""

    read: Callable[[Reader, InversionParameters, str], InversionMethod]
    """Its options; the string is the path of the parameters in the request."""
    write: Callable[[InversionParameters, Any], None]


def message_of(name: str) -> Message[Any]:
    """The message of an edit method."""
    return cast("Message[Any]", part(name, "wire").MESSAGE)


def inversion_message_of(name: str) -> InversionMessage:
    """The message of an inversion."""
    return cast(InversionMessage, part(name, "wire").INVERSION)
