"""From arguments to request messages: pure functions. What only the server can check is left to the server."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from underpaint import _wire, resources
from underpaint.choices import Fit, Priority, Sampler
from underpaint.images import ImageLike
from underpaint.methods import (
    EDIT_METHODS,
    INVERSION_METHODS,
    LEARN_METHODS,
    EditMethod,
    Generated,
    InversionMethod,
    LearnMethod,
)
from underpaint.resources import InversionHandle, Origin
from underpaint.results import Limits, Operation, Resolved
from underpaint.v1 import direction_service_pb2 as direction_pb
from underpaint.v1 import edit_service_pb2 as edit_pb
from underpaint.v1 import inversion_service_pb2 as inversion_pb
from underpaint.v1 import types_pb2 as types_pb

Source = ImageLike | InversionHandle | Generated
Example = ImageLike | int
_OPERATIONS = "operations/"
_CHUNK_BYTES = 1024 * 1024


class EditSettings(TypedDict, total=False):
    """The arguments of ``Client.edit`` that many edits can have in common."""

    source_prompt: str
    negative_prompt: str
    seed: int | None
    guidance_scale: float | None
    fit: Fit | str | None
    model: str
    output_media_type: str
    priority: Priority | str | None
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Edit:
    """A request to send, and the images behind the inversions that it names, if this client has them."""

    request: edit_pb.EditRequest
    origin: Origin | None
    second_image: types_pb.Image | None = None
    """The method's second image."""


def edit(
    source: Source,
    target_prompt: str,
    method: EditMethod,
    *,
    source_prompt: str,
    negative_prompt: str,
    seed: int | None,
    guidance_scale: float | None,
    fit: Fit | str | None,
    model: str,
    output_media_type: str,
    priority: Priority | str | None,
    request_id: str | None,
) -> Edit:
    """The request of an edit.

    Raises ValueError when settings contradict the source, TypeError for a method or source of another type, OSError
    when a file cannot be read.
    """
    request = edit_pb.EditRequest(
        request_id=request_id or new_id(),
        model=model_name(model),
        target_prompt=target_prompt,
        negative_prompt=negative_prompt,
        output_media_type=output_media_type,
        priority=_priority(priority),
        **_wire.given(seed=seed, guidance_scale=guidance_scale),
    )
    _check_method(method, EditMethod, EDIT_METHODS)
    method._write(request, source_prompt)
    origin = _set_source(request, source, fit)
    parameters = method._inversion(source_prompt)
    if parameters is not None and request.WhichOneof("source") == "image":
        request.inversion_parameters.CopyFrom(parameters)
    elif parameters is not None:
        _refuse_inversion_settings(parameters)
    return Edit(request, origin)


def invert(
    image: ImageLike,
    method: InversionMethod,
    *,
    source_prompt: str,
    steps: int | None,
    strength: float | None,
    guidance_scale: float | None,
    fit: Fit | str | None,
    verify: bool,
    model: str,
    priority: Priority | str | None,
    request_id: str | None,
) -> inversion_pb.InvertRequest:
    """The request of an inversion; TypeError for a method of another type, OSError when a file cannot be read."""
    _check_method(method, InversionMethod, INVERSION_METHODS)
    return inversion_pb.InvertRequest(
        request_id=request_id or new_id(),
        model=model_name(model),
        image=_wire.image(image, fit),
        parameters=method._parameters(source_prompt, steps, strength, guidance_scale),
        verify=verify,
        priority=_priority(priority),
    )


def learn(
    source_prompt: str,
    target_prompt: str,
    examples: Sequence[Example],
    *,
    name: str,
    display_name: str,
    steps: int | None,
    sampler: Sampler | str | None,
    guidance_scale: float | None,
    method: LearnMethod | None,
    content_weight: float | None,
    seed: int | None,
    fit: Fit | str | None,
    model: str,
    request_id: str | None,
) -> direction_pb.LearnDirectionRequest:
    """The request to learn a direction; TypeError for a method of another type, OSError when a file cannot be read."""
    direction = direction_pb.Direction(
        display_name=display_name,
        model=model_name(model),
        source_prompt=source_prompt,
        target_prompt=target_prompt,
        sampler=_wire.number(types_pb.Sampler, Sampler, "sampler", sampler),
        **_wire.given(steps=steps, guidance_scale=guidance_scale),
    )
    request = direction_pb.LearnDirectionRequest(
        request_id=request_id or new_id(),
        direction_id=resources.direction_id(name),
        direction=direction,
        examples=[_example(example, fit) for example in examples],
        **_wire.given(content_weight=content_weight, seed=seed),
    )
    if method is not None:
        _check_method(method, LearnMethod, LEARN_METHODS)
        method._write(request)
    return request


def import_direction(
    content: bytes, name: str, display_name: str, checksum: int
) -> list[direction_pb.ImportDirectionRequest]:
    """The messages of an import: the header, then the file in chunks of 1 MiB; the last one has the checksum."""
    full_name = resources.direction_name(name) if name else ""
    header = direction_pb.Direction(name=full_name, display_name=display_name)
    messages = [direction_pb.ImportDirectionRequest(header=header)]
    chunks = [content[start : start + _CHUNK_BYTES] for start in range(0, len(content), _CHUNK_BYTES)]
    messages += [direction_pb.ImportDirectionRequest(chunk=chunk) for chunk in chunks]
    messages[-1].crc32c = checksum
    return messages


def repeat(resolved: Resolved, request_id: str | None) -> Edit:
    """The resolved request unchanged, under a new request id."""
    request = edit_pb.EditRequest()
    request.CopyFrom(resolved.message)
    request.request_id = request_id or new_id()
    origin = resolved.origin if request.WhichOneof("source") == "inversion" else None
    return Edit(request, origin, resolved.second_image)


def with_images(work: Edit, missing: str) -> Edit | None:
    """The same edit with the image instead of its inversion, which the server does not have; None without the image.

    ``missing`` is the name of the inversion; empty if the server does not say it.
    """
    request = edit_pb.EditRequest()
    request.CopyFrom(work.request)
    request.request_id = new_id()  # the server refuses a request id that comes with another payload
    second = second_of(request)
    if request.inversion and missing in ("", request.inversion) and work.origin is not None:
        request.image.CopyFrom(work.origin.image)
        if not request.HasField("inversion_parameters"):  # a resolved request has those of its inversion
            request.inversion_parameters.CopyFrom(work.origin.parameters)
        request.model = request.model or work.origin.model
    elif (
        second is not None and second.inversion and missing in ("", second.inversion) and work.second_image is not None
    ):
        second.image.CopyFrom(work.second_image)
    else:
        return None
    return Edit(request, work.origin, work.second_image)


def second_of(request: edit_pb.EditRequest) -> Any:
    """The message with the second image of the request's method, or its inversion; None if it takes none."""
    method = EDIT_METHODS.get(request.WhichOneof("method") or "")
    return method._second(request) if method is not None else None


def refuse_too_large(content: bytes, model: str, limits: Mapping[str, Limits]) -> None:
    """Raise ImageTooLarge for an image above the limit of the model, or of all models if none is named.

    Checks only models whose limits were fetched before.
    """
    candidates = [limit for name, limit in limits.items() if not model or name == model]
    largest = max((limit.max_image_bytes for limit in candidates), default=0)
    if largest and len(content) > largest:
        from underpaint.errors import ImageTooLarge

        raise ImageTooLarge(
            f"the image has {len(content)} bytes, the server accepts at most {largest}: send a smaller one",
            reason="IMAGE_TOO_LARGE",
            metadata={"unit": "bytes", "limit": str(largest), "actual": str(len(content))},
        )


def new_id() -> str:
    """A random request id. All attempts of a call have the same one, so that they join the first."""
    return str(uuid.uuid4())


def new_direction_id() -> str:
    """A random id of a direction."""
    return uuid.uuid4().hex[:16]


def model_name(model: str) -> str:
    """ "models/{id}" for an id with or without the prefix; empty stays empty."""
    return model if not model or model.startswith("models/") else f"models/{model}"


def operation_name(operation: Operation | str) -> str:
    """ "operations/{id}" of an operation, a name, or an id alone."""
    name = operation.name if isinstance(operation, Operation) else operation
    return name if name.startswith(_OPERATIONS) else _OPERATIONS + name


def _check_method(method: object, base: type, table: Mapping[str, type]) -> None:
    if not isinstance(method, base):
        names = ", ".join(f"{kind.__name__}(...)" for kind in table.values())
        raise TypeError(f"method is {method!r}: pass one of {names}")


def _example(example: Example, fit: Fit | str | None) -> direction_pb.DirectionExample:
    if isinstance(example, int):
        return direction_pb.DirectionExample(**_wire.given(seed=example))
    return direction_pb.DirectionExample(image=_wire.image(example, fit))


def _set_source(request: edit_pb.EditRequest, source: Source, fit: Fit | str | None) -> Origin | None:
    if isinstance(source, Generated):
        _refuse_fit(fit, "a generated image")
        request.generated.CopyFrom(_generated(source))
        return None
    if isinstance(source, InversionHandle) or resources.is_inversion_name(source):
        _refuse_fit(fit, "an inversion")
        request.inversion = str(source)
        return source.origin if isinstance(source, InversionHandle) else None
    request.image.CopyFrom(_wire.image(source, fit))
    return None


def _generated(source: Generated) -> edit_pb.GeneratedSource:
    numbers = _wire.given(seed=source.seed, width=source.width, height=source.height, steps=source.steps)
    return edit_pb.GeneratedSource(prompt=source.prompt, **numbers)


def _refuse_inversion_settings(parameters: inversion_pb.InversionParameters) -> None:
    method = parameters.WhichOneof("method")
    names = [field.name for field, _ in parameters.ListFields() if field.name != method]
    if method is not None:
        message: Any = getattr(parameters, method)
        names += [field.name for field, _ in message.ListFields()]
    if names:
        raise ValueError(
            f"{', '.join(names)}: settings of the inversion of a photo, and the source is not a photo; leave them out"
            " (a generated image takes its steps from Generated(steps=...))"
        )


def _refuse_fit(fit: Fit | str | None, source: str) -> None:
    if fit is not None:
        raise ValueError(f"fit: {source} as source has its size already; leave it out")


def _priority(priority: Priority | str | None) -> Any:
    return _wire.number(types_pb.Priority, Priority, "priority", priority)
