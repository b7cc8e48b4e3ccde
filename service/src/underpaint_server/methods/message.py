"""Types for ``wire.py``: how a method's message in an EditRequest, or in InversionParameters, is read and written."""

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
"""Share of the schedule by which an image is inverted or noised where the request names none."""


class Fetch(Protocol):
    """What a method can fetch while its message is read."""

    async def picture(self, image: types_pb2.Image, model: ModelInfo) -> tuple[Picture, Fitting]:
        """The decoded pixels of an image in the request, fitted to the model's size.

        Raises ImageUndecodable, ImageTooLarge, QueueFull.
        """

    async def mask(self, image: types_pb2.Image, fitting: Fitting, path: str) -> Picture:
        """The decoded pixels of a mask in the request, fitted like the source.

        Raises FieldInvalid at ``path`` if the mask has another size than the source, and what ``picture`` raises.
        """

    async def inversion(self, name: str) -> tuple[Inversion, Fitting]:
        """A stored inversion. Raises InversionExpired, StoreCorrupt, StoreUnavailable."""

    async def inverted(
        self, model: ModelInfo, pixels: Picture, options: InversionOptions
    ) -> tuple[str, Photo | Stored]:
        """The name of the inversion of these pixels with these options, and the inversion if it is stored, else the
        pixels."""

    async def direction(self, name: str) -> Direction:
        """A stored direction. Raises DirectionNotFound, StoreCorrupt, StoreUnavailable."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Default values of the fields that all methods share."""

    steps: int
    source_prompt: str = ""
    target_prompt: str = ""
    guidance_scale: float | None = None
    """None means the method's default."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Input of reading a method's message."""

    request: EditRequest
    reader: Reader
    """Checks fields and collects what is wrong with them."""
    looked_up: Any
    """What the method's ``lookup`` returned; None if it has none."""
    source: DraftSource
    inversion: InversionOptions | None
    """How the source is inverted, or would be if it is generated. None where the method has no inversion, and for a
    named inversion, which is not fetched yet."""
    defaults: Defaults


@dataclass(frozen=True, slots=True)
class Completing:
    """Input of completing a method's options, after its source was fetched or decoded."""

    request: EditRequest
    model: ModelInfo
    source: EditSource
    fetch: Fetch


@dataclass(frozen=True, slots=True, kw_only=True)
class Message(Generic[Options]):
    """How one method's message in an EditRequest is read and written. Each optional part is None where the method has
    none."""

    read: Callable[[Reading], Options]
    """Returns the options from the request; the reader collects invalid fields."""
    write: Callable[[EditRequest, Options, EditSource], None]
    """Writes the message with every field set, for ``resolved``. The request's source is set already."""
    guidance_scale: float | None
    """Default guidance scale of the edit; None means that of the inversion."""
    inversion_strength: float = DEFAULT_STRENGTH
    """Default strength of the inversion that the edit starts from."""
    needs_target: bool = True
    """Whether target_prompt is required. If not, a generated source keeps its own prompt by default."""
    lookup: Callable[[EditRequest, Fetch], Awaitable[Any]] | None = None
    """Fetches, before the message is read, a stored object that reading it depends on."""
    defaults: Callable[[EditRequest, Reader, Any], Defaults] | None = None
    """Returns the defaults of shared fields where the message decides them; the last argument is what ``lookup``
    returned."""
    check: Callable[[Reading, Options], None] | None = None
    """Raises the errors that can be found only when every single field is valid."""
    complete: Callable[[Options, Completing], Awaitable[tuple[Options, EditCompanion | None]]] | None = None
    """Returns the options with what had to be decoded or fetched, and the companion; called after the source was
    fetched."""
    check_mask: Callable[[EditRequest], None] | None = None
    """For ComputeMask: raises FieldInvalid where the request already has a mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InversionMessage:
    """How one inversion method's message in InversionParameters is read and written."""

    read: Callable[[Reader, InversionParameters, str], InversionMethod]
    """Returns the options; the string is the path of the parameters in the request."""
    write: Callable[[InversionParameters, Any], None]
    """Writes the options, every field set."""


def message_of(name: str) -> Message[Any]:
    """The ``MESSAGE`` of an edit method."""
    return cast("Message[Any]", part(name, "wire").MESSAGE)


def inversion_message_of(name: str) -> InversionMessage:
    """The ``INVERSION`` of an inversion method."""
    return cast(InversionMessage, part(name, "wire").INVERSION)
