"""What a method says of its own message in an EditRequest; ``methods`` has one file for each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from underpaint.v1 import types_pb2
from underpaint.v1.edit_service_pb2 import EditRequest

from underpaint_server.jobs import Direction, EditMethod, InversionOptions, Picture
from underpaint_server.rpc.drafts import DraftSource, Injected, Named, Upload
from underpaint_server.rpc.parameters import STRENGTH
from underpaint_server.rpc.reading import Reader

Options = TypeVar("Options", bound=EditMethod)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What fields that all methods share mean where they are left out."""

    steps: int
    source_prompt: str = ""
    target_prompt: str = ""
    guidance_scale: float | None = None
    """None takes the method's."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a method may look at while its own message is read."""

    request: EditRequest
    reader: Reader
    direction: Direction | None
    """The one that the request names."""
    source: DraftSource
    inversion: InversionOptions | None
    """How the source will be inverted, where that is known yet."""
    defaults: Defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(Generic[Options]):
    """One method on the wire. What is left out here, the method does not have."""

    options: type[Options]
    read: Callable[[Asked], Options]
    """Its options; what is wrong goes to the reader's fields. A given mask is not among them."""
    write: Callable[[EditRequest, Options], None]
    """Its message with nothing left to default; the request's source is set already."""
    inversion: str | None = None
    """What it starts from: a name in ``parameters.WAYS``. None inverts nothing."""
    inversion_strength: float = STRENGTH
    """Unless told."""
    encodes_drawn: bool = False
    """Whether a picture that the model draws is inverted too; elsewhere its own noise is the inversion's end."""
    guidance_scale: float | None
    """Unless told; None takes the inversion's."""
    needs_target: bool = True
    """Whether a target prompt must be given; where not, a picture that the model draws keeps its own."""
    defaults: Callable[[EditRequest, Reader, Direction | None], Defaults] | None = None
    """Where the message decides them; else they are the model's."""
    mask: str = ""
    """Field, of the message and the options alike, that holds a picture of where the edit may act."""
    read_content: Callable[[Asked], Upload | Named] | None = None
    """Another picture whose content is taken."""
    write_content: Callable[[EditRequest, Injected], None] | None = None
    check: Callable[[Asked, Options], None] | None = None
    """What can be judged only when every field for itself is right; raises what is not."""
    after: Callable[[Options, InversionOptions], Options] | None = None
    """The options with what a stored inversion of the source tells."""

    def given_mask(self, message: Any) -> types_pb2.Image | None:
        """The mask in the method's own message, still encoded."""
        if not self.mask or not message.HasField(self.mask):
            return None
        image: types_pb2.Image = getattr(message, self.mask)
        return image

    def with_mask(self, options: Options, mask: Picture) -> Options:
        """The options with the decoded mask."""
        fields: dict[str, Any] = {self.mask: mask}
        return replace(options, **fields)
