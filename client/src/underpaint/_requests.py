"""From arguments to messages: pure functions. What the server can judge better is left to the server."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from underpaint import images
from underpaint.images import ImageLike
from underpaint.methods import (
    ContentInjection,
    Convention,
    Ddim,
    DdimInversion,
    DiffEdit,
    Disentangled,
    Edict,
    EdictInversion,
    EditMethod,
    Fit,
    Generated,
    GradientLearning,
    Interpolation,
    InversionMethod,
    LearnMethod,
    Priority,
    Sampler,
    SdEdit,
    SearchLearning,
)
from underpaint.results import Direction, InversionHandle, Limits, Operation, Origin, Resolved
from underpaint.v1 import direction_service_pb2 as direction_pb
from underpaint.v1 import edit_service_pb2 as edit_pb
from underpaint.v1 import inversion_service_pb2 as inversion_pb
from underpaint.v1 import types_pb2 as types_pb

Source = ImageLike | InversionHandle | Generated
Example = ImageLike | int
_INVERSIONS, _DIRECTIONS, _OPERATIONS = "inversions/", "directions/", "operations/"
_NO_SAMPLER = types_pb.SAMPLER_UNSPECIFIED
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Edit:
    """A request to send, and the photo behind its inversion where this client has it."""

    request: edit_pb.EditRequest
    origin: Origin | None


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
    """An edit; ValueError when settings contradict the source, OSError when a file cannot be read."""
    request = edit_pb.EditRequest(
        request_id=request_id or new_id(),
        model=model_name(model),
        target_prompt=target_prompt,
        negative_prompt=negative_prompt,
        output_media_type=output_media_type,
        priority=_priority(priority),
        **_given(seed=seed, guidance_scale=guidance_scale),
    )
    _set_method(request, method, source_prompt)
    origin = _set_source(request, source, fit)
    parameters = _inversion_of(method, source_prompt)
    if request.WhichOneof("source") != "image":
        _refuse_inversion_settings(parameters)
    elif parameters is not None:
        request.inversion_parameters.CopyFrom(parameters)
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
    """An inversion; OSError when a file cannot be read."""
    return inversion_pb.InvertRequest(
        request_id=request_id or new_id(),
        model=model_name(model),
        image=types_pb.Image(content=images.encoded(image), fit=_fit(fit)),
        parameters=_inversion_parameters(method, source_prompt, steps, strength, guidance_scale),
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
    """What to learn; OSError when a file cannot be read."""
    direction = direction_pb.Direction(
        display_name=display_name,
        model=model_name(model),
        source_prompt=source_prompt,
        target_prompt=target_prompt,
        sampler=_sampler(sampler),
        **_given(steps=steps, guidance_scale=guidance_scale),
    )
    request = direction_pb.LearnDirectionRequest(
        request_id=request_id or new_id(),
        direction_id=name.removeprefix(_DIRECTIONS),
        direction=direction,
        examples=[_example(each, fit) for each in examples],
        **_given(content_weight=content_weight, seed=seed),
    )
    match method:
        case GradientLearning():
            request.method = direction_pb.LEARN_METHOD_GRADIENT
            settings = ("optimization_steps", "learning_rate", "switch_step", "late_weight")
            chosen = _given(**{each: getattr(method, each) for each in settings})
            request.MergeFrom(direction_pb.LearnDirectionRequest(**chosen))
        case SearchLearning():
            request.method = direction_pb.LEARN_METHOD_SEARCH
            candidates = direction_pb.SearchCandidates(
                switch_steps=method.switch_steps, late_weights=method.late_weights
            )
            if candidates.ByteSize():
                request.candidates.CopyFrom(candidates)
        case None:
            pass
        case _:
            raise TypeError(f"a way to learn is GradientLearning() or SearchLearning(), not {method!r}")
    return request


def import_direction(
    content: bytes, name: str, display_name: str, checksum: int
) -> list[direction_pb.ImportDirectionRequest]:
    """The messages of an import: the header, then the file in chunks, its checksum with the last."""
    header = direction_pb.Direction(name=direction_name(name) if name else "", display_name=display_name)
    parts = [direction_pb.ImportDirectionRequest(header=header)]
    starts = range(0, len(content), _CHUNK_BYTES)
    parts += [direction_pb.ImportDirectionRequest(chunk=content[start : start + _CHUNK_BYTES]) for start in starts]
    parts[-1].crc32c = checksum
    return parts


def repeat(resolved: Resolved, request_id: str | None) -> Edit:
    """The resolved request as it is, under a new id."""
    request = edit_pb.EditRequest()
    request.CopyFrom(resolved.message)
    request.request_id = request_id or new_id()
    return Edit(request, resolved.origin if request.WhichOneof("source") == "inversion" else None)


def from_origin(work: Edit) -> edit_pb.EditRequest | None:
    """The same edit, from the photo instead of the inversion that is gone; None when the photo is not here."""
    if work.origin is None:
        return None
    request = edit_pb.EditRequest()
    request.CopyFrom(work.request)
    request.request_id = new_id()  # the old id belongs to the payload that was refused
    request.image.CopyFrom(work.origin.image)
    request.inversion_parameters.CopyFrom(work.origin.parameters)
    request.model = request.model or work.origin.model
    return request


def refuse_too_large(content: bytes, model: str, limits: Mapping[str, Limits]) -> None:
    """Refuse a picture over the limit of every model it could be for, where limits are known already."""
    candidates = [limit for name, limit in limits.items() if not model or name == model]
    largest = max((limit.max_image_bytes for limit in candidates), default=0)
    if largest and len(content) > largest:
        from underpaint.errors import ImageTooLarge

        raise ImageTooLarge(
            f"the picture has {len(content)} bytes, the server takes {largest}: send a smaller one",
            reason="IMAGE_TOO_LARGE",
            metadata={"limit": str(largest), "actual": str(len(content))},
        )


def new_id() -> str:
    """A request id of our own makes every retry of the channel join the first attempt."""
    return str(uuid.uuid4())


def model_name(model: str) -> str:
    """ "models/{id}" for an id with or without the prefix; empty stays empty."""
    return model if not model or model.startswith("models/") else f"models/{model}"


def inversion_name(inversion: InversionHandle | str) -> str:
    """ "inversions/{sha256}" of a handle, a name, or a bare digest."""
    name = str(inversion)
    return name if name.startswith(_INVERSIONS) else _INVERSIONS + name


def direction_name(direction: Direction | str) -> str:
    """ "directions/{id}" of a direction, a name, or a bare id."""
    name = str(direction)
    return name if name.startswith(_DIRECTIONS) else _DIRECTIONS + name


def operation_name(operation: Operation | str) -> str:
    """ "operations/{id}" of an operation, a name, or a bare id."""
    name = operation.name if isinstance(operation, Operation) else operation
    return name if name.startswith(_OPERATIONS) else _OPERATIONS + name


def _example(example: Example, fit: Fit | str | None) -> direction_pb.DirectionExample:
    if isinstance(example, int):
        return direction_pb.DirectionExample(seed=example)
    return direction_pb.DirectionExample(image=types_pb.Image(content=images.encoded(example), fit=_fit(fit)))


def _set_source(request: edit_pb.EditRequest, source: Source, fit: Fit | str | None) -> Origin | None:
    if isinstance(source, Generated):
        _refuse_fit(fit)
        request.generated.CopyFrom(_generated(source))
        return None
    if isinstance(source, InversionHandle) or _is_name(source):
        _refuse_fit(fit)
        request.inversion = str(source)
        return source.origin if isinstance(source, InversionHandle) else None
    request.image.content = images.encoded(source)
    request.image.fit = _fit(fit)
    return None


def _is_name(source: object) -> bool:
    return isinstance(source, str) and source.startswith(_INVERSIONS)


def _generated(source: Generated) -> edit_pb.GeneratedSource:
    numbers = _given(seed=source.seed, width=source.width, height=source.height, steps=source.steps)
    return edit_pb.GeneratedSource(prompt=source.prompt, **numbers)


def _set_method(request: edit_pb.EditRequest, method: EditMethod, source_prompt: str) -> None:
    match method:
        case Edict():
            request.edict.SetInParent()
        case Ddim():
            request.ddim.SetInParent()
        case SdEdit():
            request.sdedit.CopyFrom(edit_pb.SdEdit(**_given(strength=method.strength, steps=method.steps)))
        case DiffEdit():
            request.diffedit.CopyFrom(_diffedit(method))
        case Disentangled():
            request.disentangled.CopyFrom(_disentangled(method, source_prompt))
        case ContentInjection():
            request.content_injection.CopyFrom(_injection(method))
        case _:
            raise TypeError(
                "an edit method is Edict(), Ddim(), SdEdit(), DiffEdit(), Disentangled(...) or ContentInjection(...), "
                f"not {method!r}"
            )


def _diffedit(method: DiffEdit) -> edit_pb.DiffEdit:
    numbers = _given(threshold=method.threshold, samples=method.samples, mask_strength=method.mask_strength)
    mask = types_pb.Image(content=images.encoded(method.mask)) if method.mask is not None else None
    return edit_pb.DiffEdit(mask=mask, reference_prompt=method.reference_prompt, **numbers)


def _injection(method: ContentInjection) -> edit_pb.ContentInjectionEdit:
    names = ("weight", "calibration", "injection_end", "every", "boosting_start")
    message = edit_pb.ContentInjectionEdit(sites=method.sites, **_given(**{n: getattr(method, n) for n in names}))
    if method.interpolation is not None:
        name = f"INTERPOLATION_{Interpolation(method.interpolation).upper()}"
        message.interpolation = edit_pb.Interpolation.Value(name)
    if method.region is not None:
        message.region.content = images.encoded(method.region)
    content = method.content
    if isinstance(content, InversionHandle) or _is_name(content):
        if method.content_fit is not None:
            raise ValueError("content_fit is for photos; this content has its size already: leave it out")
        message.inversion = str(content)
    else:
        message.image.content = images.encoded(content)
        message.image.fit = _fit(method.content_fit)
    return message


def _disentangled(method: Disentangled, source_prompt: str) -> edit_pb.DisentangledEdit:
    ways = _given(direction=method.direction, switch_step=method.switch_step, weights=method.weights)
    if len(ways) != 1:
        raise ValueError(f"Disentangled takes one of direction, switch_step and weights, not {len(ways)} of them")
    message = edit_pb.DisentangledEdit(
        source_prompt=source_prompt,
        sampler=_sampler(method.sampler),
        **_given(switch_step=method.switch_step, scale=method.scale, steps=method.steps),
    )
    if method.direction is not None:
        message.direction = direction_name(method.direction)
    if method.weights is not None:
        message.given.values.extend(method.weights)
        message.given.SetInParent()
    return message


def _inversion_of(method: EditMethod, source_prompt: str) -> inversion_pb.InversionParameters | None:
    match method:
        case Edict():
            way: InversionMethod = EdictInversion(mixing_coefficient=method.mixing_coefficient)
        case Ddim() | DiffEdit() | ContentInjection():
            way = DdimInversion(convention=method.convention)
        case SdEdit():  # inverts nothing; a source prompt is for the server to refuse
            return inversion_pb.InversionParameters(source_prompt=source_prompt) if source_prompt else None
        case Disentangled():  # likewise; the source prompt is its own
            return None
    return _inversion_parameters(way, source_prompt, method.steps, method.strength, method.inversion_guidance_scale)


def _inversion_parameters(
    method: InversionMethod, source_prompt: str, steps: int | None, strength: float | None, guidance_scale: float | None
) -> inversion_pb.InversionParameters:
    numbers = _given(steps=steps, strength=strength, guidance_scale=guidance_scale)
    parameters = inversion_pb.InversionParameters(source_prompt=source_prompt, **numbers)
    match method:
        case EdictInversion():
            parameters.edict.SetInParent()
            if method.mixing_coefficient is not None:
                parameters.edict.mixing_coefficient = method.mixing_coefficient
        case DdimInversion():
            parameters.ddim.SetInParent()
            if method.convention is not None:
                name = f"DDIM_CONVENTION_{Convention(method.convention).upper()}"
                parameters.ddim.convention = inversion_pb.DdimConvention.Value(name)
            parameters.ddim.features.extend(method.features)
        case _:
            raise TypeError(f"an inversion method is EdictInversion() or DdimInversion(), not {method!r}")
    return parameters


def _refuse_inversion_settings(parameters: inversion_pb.InversionParameters | None) -> None:
    if parameters is None:
        return
    names = [field.name for field, _ in parameters.ListFields() if field.name not in ("edict", "ddim")]
    names += [field.name for way in (parameters.edict, parameters.ddim) for field, _ in way.ListFields()]
    if names:
        raise ValueError(
            f"{', '.join(names)} decide how a photo is inverted; this source is no photo: leave them out"
            " (a generated picture takes its steps in Generated(steps=...))"
        )


def _refuse_fit(fit: Fit | str | None) -> None:
    if fit is not None:
        raise ValueError("fit is for photos; this source has its size already: leave it out")


def _fit(fit: Fit | str | None) -> types_pb.Fit.ValueType:
    return types_pb.Fit.Value(f"FIT_{Fit(fit).upper()}") if fit is not None else types_pb.FIT_UNSPECIFIED


def _sampler(sampler: Sampler | str | None) -> types_pb.Sampler.ValueType:
    return types_pb.Sampler.Value(f"SAMPLER_{Sampler(sampler).upper()}") if sampler is not None else _NO_SAMPLER


def _priority(priority: Priority | str | None) -> types_pb.Priority.ValueType:
    if priority is None:
        return types_pb.PRIORITY_UNSPECIFIED
    return types_pb.Priority.Value(f"PRIORITY_{Priority(priority).upper()}")


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
