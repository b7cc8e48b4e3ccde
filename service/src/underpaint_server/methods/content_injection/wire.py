"""Content injection's message. The content is fetched or decoded here, and its size compared with the source's."""

from dataclasses import replace
from typing import Final

from underpaint.v1.edit_service_pb2 import (
    INTERPOLATION_LERP,
    INTERPOLATION_SLERP,
    ContentInjectionEdit,
    EditRequest,
)
from underpaint.v1.edit_service_pb2 import Interpolation as InterpolationMessage

from underpaint_server.errors import FieldInvalid, FieldViolation, InversionModelMismatch
from underpaint_server.jobs import DdimConvention, Interpolation, Inversion, InversionOptions, Photo, Stored
from underpaint_server.methods.content_injection.options import ContentInjection, injected_steps
from underpaint_server.methods.ddim.options import DdimInversion
from underpaint_server.methods.message import Completing, Message, Reading
from underpaint_server.wire import images
from underpaint_server.wire.drafts import EditCompanion, EditSource
from underpaint_server.wire.names import inversion_id, inversion_name

_PATH: Final = "content_injection"
_STRENGTH: Final = 1.0
"""As in the paper: the source is regenerated from the noisiest level."""
_WEIGHT: Final = 0.3
_INJECTION_END: Final = 0.4
_SITES: Final = ("mid",)

_INTERPOLATIONS: Final = {Interpolation.SLERP: INTERPOLATION_SLERP, Interpolation.LERP: INTERPOLATION_LERP}
_INTERPOLATION_OF: Final = {message: interpolation for interpolation, message in _INTERPOLATIONS.items()}


def _read(reading: Reading) -> ContentInjection:
    message, reader, fields = reading.request.content_injection, reading.reader, reading.reader.fields
    weight = message.weight if message.HasField("weight") else _WEIGHT
    injection_end = message.injection_end if message.HasField("injection_end") else _INJECTION_END
    fields.known(f"{_PATH}.interpolation", message.interpolation, InterpolationMessage.DESCRIPTOR)
    options = ContentInjection(
        weight=fields.between(f"{_PATH}.weight", weight, 0, 1),
        calibration=fields.between(f"{_PATH}.calibration", message.calibration, 0, 1),
        region=None,
        injection_end=fields.between(f"{_PATH}.injection_end", injection_end, 0, 1),
        every=fields.count(f"{_PATH}.every", message.every, 1, reader.limits.max_steps),
        boosting_start=fields.between(f"{_PATH}.boosting_start", message.boosting_start, 0, 1),
        interpolation=_INTERPOLATION_OF.get(message.interpolation, Interpolation.SLERP),
        sites=reader.sites(f"{_PATH}.sites", message.sites or _SITES),
    )
    _read_content(reading)
    return options


def _read_content(reading: Reading) -> None:
    """Check the fields of the content. The content itself is fetched later, when the size of the source is known."""
    message, fields = reading.request.content_injection, reading.reader.fields
    if message.WhichOneof("content") == "inversion":
        try:
            inversion_id(message.inversion, f"{_PATH}.inversion")
        except FieldInvalid as error:
            fields.report_all(error)
    if message.WhichOneof("content") is None:
        fields.report(f"{_PATH}.content", "not set; choose one of image, inversion")
    reading.reader.image(f"{_PATH}.image", message.image)


def _check(reading: Reading, options: ContentInjection) -> None:
    if reading.inversion is not None:
        check_injection(options, reading.inversion)


def check_injection(options: ContentInjection, inversion: InversionOptions) -> None:
    """Raise FieldInvalid where no step would inject content."""
    if not injected_steps(options, inversion):
        raise FieldInvalid(
            FieldViolation(
                f"{_PATH}.injection_end",
                f"{options.injection_end:g} is not below the inversion's strength, {inversion.strength:g}, by a step, "
                "so no content would be injected; use a lower injection_end or a higher strength",
            )
        )


async def _complete(options: ContentInjection, completing: Completing) -> tuple[ContentInjection, EditCompanion]:
    """The options with the region, and the content as companion.

    Raises ImageUndecodable, ImageTooLarge and QueueFull from decoding, FieldInvalid where content and source do not
    match; for a named inversion also InversionExpired, InversionModelMismatch, StoreCorrupt and StoreUnavailable.
    """
    message, source = completing.request.content_injection, completing.source
    assert source.inversion is not None
    check_injection(options, source.inversion)
    if message.WhichOneof("content") == "inversion":
        companion = await _from_store(options, completing)
    else:
        companion = await _from_image(options, completing, source.inversion)
    if message.HasField("region"):
        region = await completing.fetch.mask(message.region, source.fitting, f"{_PATH}.region")
        options = replace(options, region=region)
    return options, companion


async def _from_image(options: ContentInjection, completing: Completing, inversion: InversionOptions) -> EditCompanion:
    image, model, size = completing.request.content_injection.image, completing.model, completing.source.fitting.size
    pixels, fitting = await completing.fetch.picture(image, replace(model, width=size[0], height=size[1]))
    if fitting.size != size:
        description = f"{_sizes(fitting.size, size)}; use FIT_CROP or FIT_PAD, which give the content the source's size"
        raise FieldInvalid(FieldViolation(f"{_PATH}.image.fit", description))
    content_options = _content_options(inversion, options)
    name, stored = await completing.fetch.inverted(model, pixels, content_options)
    source = _features(stored.inversion, options) if isinstance(stored, Stored) else stored
    return EditCompanion(source, content_options, fitting, name)


async def _from_store(options: ContentInjection, completing: Completing) -> EditCompanion:
    path, model, size = f"{_PATH}.inversion", completing.model, completing.source.fitting.size
    name = inversion_id(completing.request.content_injection.inversion, path)
    inversion, fitting = await completing.fetch.inversion(name)
    if inversion.model_digest != model.digest:
        resource = inversion_name(name)
        raise InversionModelMismatch(
            f"{resource} was made with other weights than models/{model.id}; send the content's image instead",
            metadata={"resource_name": resource},
        )
    method = inversion.options.method
    stored_sites = method.features if isinstance(method, DdimInversion) else ()
    missing = [site for site in options.sites if site not in stored_sites]
    if missing:
        raise FieldInvalid(
            FieldViolation(
                path,
                f"has no features of {', '.join(missing)}; send the content's image instead, or invert it with "
                f"ddim.features {', '.join(options.sites)}",
            )
        )
    content_size = (inversion.width, inversion.height)
    if content_size != size:
        raise FieldInvalid(FieldViolation(path, f"{_sizes(content_size, size)}; send the content's image instead"))
    return EditCompanion(_features(inversion, options), inversion.options, fitting, name)


def _features(inversion: Inversion, options: ContentInjection) -> Stored:
    """The inversion with only the arrays that are injected: the others need not be sent to the engine process."""
    return Stored(replace(inversion, arrays={f"h_{site}": inversion.arrays[f"h_{site}"] for site in options.sites}))


def _content_options(source: InversionOptions, options: ContentInjection) -> InversionOptions:
    """How the content is inverted: like the source, but without a prompt, since the source's does not describe it."""
    convention = source.method.convention if isinstance(source.method, DdimInversion) else DdimConvention.TARGET
    return replace(source, method=DdimInversion(convention, options.sites), guidance_scale=1.0, source_prompt="")


def _sizes(content: tuple[int, int], source: tuple[int, int]) -> str:
    return f"the content would have {content[0]}x{content[1]} pixels, the source has {source[0]}x{source[1]}"


def _write(request: EditRequest, options: ContentInjection, source: EditSource) -> None:
    request.content_injection.CopyFrom(
        ContentInjectionEdit(
            weight=options.weight,
            calibration=options.calibration,
            region=None if options.region is None else images.encode(options.region),
            injection_end=options.injection_end,
            every=options.every,
            boosting_start=options.boosting_start,
            interpolation=_INTERPOLATIONS[options.interpolation],
            sites=options.sites,
        )
    )
    companion = source.companion
    assert companion is not None
    if companion.name:
        request.content_injection.inversion = inversion_name(companion.name)
        return
    assert isinstance(companion.source, Photo)  # a stored inversion has a name
    request.content_injection.image.CopyFrom(images.encode(companion.source.pixels))


MESSAGE = Message(
    read=_read,
    write=_write,
    guidance_scale=1.0,
    inversion_strength=_STRENGTH,
    needs_target=False,
    check=_check,
    complete=_complete,
)
