"""The calls of the client without the I/O: generators that yield a :class:`Call`, receive its answer, return a result.

An answer is the response message, or for a server stream the return value of its reader's ``end``. A failed call is
thrown into the generator as an UnderpaintError. Both clients run these generators.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from google.longrunning import operations_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from underpaint import _crc32c, _requests, _responses, results
from underpaint.errors import (
    DirectionExists,
    ExportCorrupt,
    InversionExpired,
    NotFound,
    ServerError,
    StoreCorrupt,
)
from underpaint.v1 import direction_service_pb2 as direction_pb
from underpaint.v1 import edit_service_pb2 as edit_pb
from underpaint.v1 import inversion_service_pb2 as inversion_pb
from underpaint.v1 import model_service_pb2 as model_pb

T = TypeVar("T")
OnProgress = Callable[[results.Progress], Any]
OnPreview = Callable[[results.Preview], Any]
Delivery = tuple[Callable[[Any], Any], Any]
"""A callback of the caller's, and its argument."""


class Reader(Protocol):
    """Turns the messages of a server stream into one answer."""

    def begin(self) -> None:
        """Forget all messages: called before every attempt of the call."""

    def feed(self, message: Any) -> Iterable[Delivery]:
        """Take the next message; returns the callbacks to call for it."""

    def end(self) -> Any:
        """The answer, after the last message."""


@dataclass(frozen=True, slots=True)
class Method:
    """An RPC of the contract."""

    path: str
    response: type[Message]


@dataclass(frozen=True, slots=True)
class Call:
    """One RPC to make: a server stream if it has a reader, a client stream if it has more messages, else unary."""

    method: Method
    request: Message
    reader: Reader | None = None
    more: Sequence[Message] = ()
    """Messages after the request on a client stream."""

    @property
    def name(self) -> str:
        """Name of the RPC."""
        return self.method.path.rpartition("/")[2]

    @property
    def request_id(self) -> str:
        """Request id; empty for a request without one. A streaming request has it in its field for the work."""
        request: Any = self.request
        work = getattr(request, "edit", None) or getattr(request, "invert", None) or request
        return getattr(work, "request_id", "")


Flow = Generator[Call, Any, T]


@dataclass(frozen=True, slots=True)
class Listeners:
    """The caller's callbacks for an edit that runs."""

    on_progress: OnProgress | None = None
    on_preview: OnPreview | None = None
    preview_every: int | None = None
    """Steps from one preview to the next, 1 or more. Default: 5."""

    def __post_init__(self) -> None:
        if self.preview_every is not None and self.on_preview is None:
            raise ValueError("preview_every needs on_preview, which receives the previews: set both or neither")
        if self.preview_every is not None and self.preview_every < 1:
            raise ValueError(f"preview_every is {self.preview_every}: it must be a number of steps, 1 or more")

    @property
    def any(self) -> bool:
        """Whether there is a callback; without one the unary RPC is called."""
        return self.on_progress is not None or self.on_preview is not None


_DEFAULT_PREVIEW_EVERY = 5

# Called before the first call, to tell a wrong target from a slow request: any answer shows that a server is there.
PROBE = Call(Method("/grpc.health.v1.Health/Check", Empty), Empty())

_EDIT = Method("/underpaint.v1.EditService/Edit", edit_pb.EditResponse)
_STREAM_EDIT = Method("/underpaint.v1.EditService/StreamEdit", edit_pb.StreamEditResponse)
_COMPUTE_MASK = Method("/underpaint.v1.EditService/ComputeMask", edit_pb.ComputeMaskResponse)
_INVERT = Method("/underpaint.v1.InversionService/Invert", inversion_pb.InvertResponse)
_STREAM_INVERT = Method("/underpaint.v1.InversionService/StreamInvert", inversion_pb.StreamInvertResponse)
_GET_INVERSION = Method("/underpaint.v1.InversionService/GetInversion", inversion_pb.GetInversionResponse)
_LIST_INVERSIONS = Method("/underpaint.v1.InversionService/ListInversions", inversion_pb.ListInversionsResponse)
_DELETE_INVERSION = Method("/underpaint.v1.InversionService/DeleteInversion", inversion_pb.DeleteInversionResponse)
_EXPORT_INVERSION = Method("/underpaint.v1.InversionService/ExportInversion", inversion_pb.ExportInversionResponse)
_GET_MODEL = Method("/underpaint.v1.ModelService/GetModel", model_pb.GetModelResponse)
_LIST_MODELS = Method("/underpaint.v1.ModelService/ListModels", model_pb.ListModelsResponse)
_LEARN = Method("/underpaint.v1.DirectionService/LearnDirection", direction_pb.LearnDirectionResponse)
_GET_DIRECTION = Method("/underpaint.v1.DirectionService/GetDirection", direction_pb.GetDirectionResponse)
_LIST_DIRECTIONS = Method("/underpaint.v1.DirectionService/ListDirections", direction_pb.ListDirectionsResponse)
_DELETE_DIRECTION = Method("/underpaint.v1.DirectionService/DeleteDirection", direction_pb.DeleteDirectionResponse)
_EXPORT_DIRECTION = Method("/underpaint.v1.DirectionService/ExportDirection", direction_pb.ExportDirectionResponse)
_IMPORT_DIRECTION = Method("/underpaint.v1.DirectionService/ImportDirection", direction_pb.ImportDirectionResponse)
_GET_OPERATION = Method("/google.longrunning.Operations/GetOperation", operations_pb2.Operation)
_WAIT_OPERATION = Method("/google.longrunning.Operations/WaitOperation", operations_pb2.Operation)
_LIST_OPERATIONS = Method("/google.longrunning.Operations/ListOperations", operations_pb2.ListOperationsResponse)
_CANCEL_OPERATION = Method("/google.longrunning.Operations/CancelOperation", Empty)
_DELETE_OPERATION = Method("/google.longrunning.Operations/DeleteOperation", Empty)


def edit(work: _requests.Edit, listeners: Listeners) -> Flow[results.Edited]:
    """Edit an image. If an inversion has expired whose image the client has, the edit is sent again with the image."""
    sent, response = yield from _or_with_images(work, lambda request: _edit_call(request, listeners))
    return _responses.edited(response, sent)


def compute_mask(work: _requests.Edit) -> Flow[results.Mask]:
    """Compute a mask. If the source's inversion has expired, the request is sent again with the photo."""
    sent, response = yield from _or_with_images(
        work, lambda request: Call(_COMPUTE_MASK, edit_pb.ComputeMaskRequest(edit=request))
    )
    return _responses.mask(response, sent)


def invert(request: inversion_pb.InvertRequest, on_progress: OnProgress | None) -> Flow[results.Inversion]:
    """Invert a photo."""
    if on_progress is None:
        response = yield Call(_INVERT, request)
    else:
        reader = _Events({"progress": (on_progress, _responses.progress)})
        response = yield Call(_STREAM_INVERT, inversion_pb.StreamInvertRequest(invert=request), reader)
    return _responses.inverted(response, request)


def get_inversion(name: str) -> Flow[results.Inversion]:
    """Fetch one inversion."""
    response = yield Call(_GET_INVERSION, inversion_pb.GetInversionRequest(name=name))
    return _responses.inversion(response.inversion)


def list_inversions(page_size: int, page_token: str) -> Flow[tuple[list[results.Inversion], str]]:
    """One page, and the token of the next, empty after the last."""
    request = inversion_pb.ListInversionsRequest(page_size=page_size, page_token=page_token)
    response = yield Call(_LIST_INVERSIONS, request)
    return [_responses.inversion(message) for message in response.inversions], response.next_page_token


def delete_inversion(name: str, allow_missing: bool) -> Flow[None]:
    """Delete one inversion."""
    yield from _delete(
        Call(_DELETE_INVERSION, inversion_pb.DeleteInversionRequest(name=name, allow_missing=allow_missing))
    )


def export_inversion(name: str) -> Flow[bytes]:
    """The safetensors file of an inversion, with size and checksum verified."""
    content: bytes = yield Call(_EXPORT_INVERSION, inversion_pb.ExportInversionRequest(name=name), _Export(name))
    return content


def learn(request: direction_pb.LearnDirectionRequest) -> Flow[results.Operation]:
    """Start to learn a direction."""
    response = yield Call(_LEARN, request)
    return _responses.operation(response.operation)


def get_direction(name: str) -> Flow[results.Direction]:
    """Fetch one direction."""
    response = yield Call(_GET_DIRECTION, direction_pb.GetDirectionRequest(name=name))
    return _responses.direction(response.direction)


def list_directions(page_size: int, page_token: str) -> Flow[tuple[list[results.Direction], str]]:
    """One page, and the token of the next, empty after the last."""
    request = direction_pb.ListDirectionsRequest(page_size=page_size, page_token=page_token)
    response = yield Call(_LIST_DIRECTIONS, request)
    return [_responses.direction(message) for message in response.directions], response.next_page_token


def delete_direction(name: str, etag: str) -> Flow[None]:
    """Delete one direction."""
    yield from _delete(Call(_DELETE_DIRECTION, direction_pb.DeleteDirectionRequest(name=name, etag=etag)))


def export_direction(name: str) -> Flow[bytes]:
    """The safetensors file of a direction, with size and checksum verified."""
    content: bytes = yield Call(_EXPORT_DIRECTION, direction_pb.ExportDirectionRequest(name=name), _Export(name))
    return content


def import_direction(content: bytes, name: str, display_name: str) -> Flow[results.Direction]:
    """Store an exported file as a direction."""
    # A random name is chosen here, so that a repeat after a lost answer finds what the first attempt stored.
    first, *more = _requests.import_direction(
        content, name or _requests.new_direction_id(), display_name, _crc32c.extend(0, content)
    )
    try:
        response = yield Call(_IMPORT_DIRECTION, first, more=more)
    except DirectionExists as error:
        if not error._answer_lost:
            raise
        stored = first.header.name
        if name and content != (yield from export_direction(stored)):
            raise
        response = yield Call(_GET_DIRECTION, direction_pb.GetDirectionRequest(name=stored))
    return _responses.direction(response.direction)


def get_operation(name: str) -> Flow[results.Operation]:
    """Fetch one operation."""
    response = yield Call(_GET_OPERATION, operations_pb2.GetOperationRequest(name=name))
    return _responses.operation(response)


def wait_operation(name: str, seconds: float) -> Flow[results.Operation]:
    """The operation once it is done, or its state after so many seconds."""
    timeout = Duration()
    timeout.FromNanoseconds(round(seconds * 1e9))
    response = yield Call(_WAIT_OPERATION, operations_pb2.WaitOperationRequest(name=name, timeout=timeout))
    return _responses.operation(response)


def list_operations(done: bool | None, page_size: int, page_token: str) -> Flow[tuple[list[results.Operation], str]]:
    """One page, and the token of the next, empty after the last."""
    done_filter = "" if done is None else f"done={str(done).lower()}"
    request = operations_pb2.ListOperationsRequest(
        name="operations", filter=done_filter, page_size=page_size, page_token=page_token
    )
    response = yield Call(_LIST_OPERATIONS, request)
    return [_responses.operation(message) for message in response.operations], response.next_page_token


def cancel_operation(name: str) -> Flow[None]:
    """Cancel one operation."""
    yield Call(_CANCEL_OPERATION, operations_pb2.CancelOperationRequest(name=name))


def delete_operation(name: str) -> Flow[None]:
    """Delete one operation from the server's list."""
    yield from _delete(Call(_DELETE_OPERATION, operations_pb2.DeleteOperationRequest(name=name)))


def get_model(name: str) -> Flow[results.Model]:
    """Fetch one model."""
    response = yield Call(_GET_MODEL, model_pb.GetModelRequest(name=name))
    return _responses.model(response.model)


def list_models() -> Flow[list[results.Model]]:
    """All models, fetched page by page."""
    models: list[results.Model] = []
    token = ""
    while True:
        response = yield Call(_LIST_MODELS, model_pb.ListModelsRequest(page_token=token))
        models += [_responses.model(message) for message in response.models]
        token = response.next_page_token
        if not token:
            return models


def _delete(call: Call) -> Flow[None]:
    try:
        yield call
    except NotFound as error:
        if not error._answer_lost:  # else an earlier attempt may have deleted it
            raise


def _edit_call(request: edit_pb.EditRequest, listeners: Listeners) -> Call:
    if not listeners.any:
        return Call(_EDIT, request)
    routes: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {}
    if listeners.on_progress is not None:
        routes["accepted"] = (listeners.on_progress, _responses.accepted)
        routes["progress"] = (listeners.on_progress, _responses.progress)
    every = 0
    if listeners.on_preview is not None:
        routes["preview"] = (listeners.on_preview, _responses.preview)
        every = listeners.preview_every or _DEFAULT_PREVIEW_EVERY
    return Call(_STREAM_EDIT, edit_pb.StreamEditRequest(edit=request, preview_every=every), _Events(routes))


def _or_with_images(
    work: _requests.Edit, call: Callable[[edit_pb.EditRequest], Call]
) -> Flow[tuple[_requests.Edit, Any]]:
    while True:
        try:
            return work, (yield call(work.request))
        except (InversionExpired, StoreCorrupt) as error:
            again = _requests.with_images(work, error.metadata.get("resource_name", ""))
            if again is None:
                raise
            work = again  # with one inversion less, so this ends


class _Events:
    """Passes the events of a stream to their callbacks and keeps the last event, the result."""

    def __init__(self, routes: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]]) -> None:
        self._routes = routes
        self._result: Any = None
        self._fraction = 0.0

    def begin(self) -> None:
        self._result = None

    def feed(self, message: Any) -> Iterable[Delivery]:
        kind = message.WhichOneof("event")
        if kind == "result":
            self._result = message.result
        elif kind in self._routes:  # events without a callback, or unknown to this client, are ignored
            callback, convert = self._routes[kind]
            yield callback, self._never_back(convert(getattr(message, kind)))

    def end(self) -> Any:
        if self._result is None:
            raise ServerError("the server ended the stream without a result: send the request again")
        return self._result

    def _never_back(self, event: Any) -> Any:
        """An attempt after the first begins anew; the share that is done stays until it has caught up."""
        if not isinstance(event, results.Progress):
            return event
        self._fraction = max(self._fraction, event.fraction)
        return replace(event, fraction=self._fraction)


class _Export:
    """Assembles a file from its chunks and verifies it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.begin()

    def begin(self) -> None:
        self._content = bytearray()
        self._total: int | None = None
        self._crc = 0
        self._expected_crc: int | None = None

    def feed(
        self, message: inversion_pb.ExportInversionResponse | direction_pb.ExportDirectionResponse
    ) -> Iterable[Delivery]:
        if self._total is None:
            self._total = message.total_bytes
        self._content += message.chunk
        self._crc = _crc32c.extend(self._crc, message.chunk)
        self._expected_crc = message.crc32c
        return ()

    def end(self) -> bytes:
        if len(self._content) != self._total:
            raise ExportCorrupt(
                f"{self._name}: {len(self._content)} of {self._total or 0} bytes were received; export again",
                metadata={"expected": str(self._total or 0), "actual": str(len(self._content))},
            )
        if self._crc != self._expected_crc:
            raise ExportCorrupt(
                f"{self._name}: the checksum of the received file does not match; export again",
                metadata={"expected": f"{self._expected_crc:08x}", "actual": f"{self._crc:08x}"},
            )
        return bytes(self._content)
