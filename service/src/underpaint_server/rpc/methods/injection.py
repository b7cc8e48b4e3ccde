"""Content injection on the wire. The content itself is fetched in ``contents``."""

from typing import Final

from underpaint.v1.edit_service_pb2 import (
    INTERPOLATION_LERP,
    INTERPOLATION_SLERP,
    ContentInjectionEdit,
    EditRequest,
)
from underpaint.v1.edit_service_pb2 import Interpolation as InterpolationMessage

from underpaint_server.errors import FieldInvalid, FieldViolation
from underpaint_server.jobs import ContentInjection, Interpolation, InversionOptions, Photo
from underpaint_server.plans import injected_steps
from underpaint_server.rpc import images
from underpaint_server.rpc.drafts import Injected, Named, Upload
from underpaint_server.rpc.method import Asked, Method
from underpaint_server.rpc.names import inversion_id, inversion_name

_AT: Final = "content_injection"
_STRENGTH: Final = 1.0
"""The paper's: an injection draws the source again from noise alone."""
_WEIGHT: Final = 0.3
_INJECTION_END: Final = 0.4
_SITES: Final = ("mid",)

_INTERPOLATIONS: Final = {Interpolation.SLERP: INTERPOLATION_SLERP, Interpolation.LERP: INTERPOLATION_LERP}
_INTERPOLATION_OF: Final = {message: way for way, message in _INTERPOLATIONS.items()}


def _read(asked: Asked) -> ContentInjection:
    message, reader, fields = asked.request.content_injection, asked.reader, asked.reader.fields
    weight = message.weight if message.HasField("weight") else _WEIGHT
    injection_end = message.injection_end if message.HasField("injection_end") else _INJECTION_END
    fields.known(f"{_AT}.interpolation", message.interpolation, InterpolationMessage.DESCRIPTOR)
    return ContentInjection(
        weight=fields.between(f"{_AT}.weight", weight, 0, 1),
        calibration=fields.between(f"{_AT}.calibration", message.calibration, 0, 1),
        region=None,
        injection_end=fields.between(f"{_AT}.injection_end", injection_end, 0, 1),
        every=fields.count(f"{_AT}.every", message.every, 1, reader.limits.max_steps),
        boosting_start=fields.between(f"{_AT}.boosting_start", message.boosting_start, 0, 1),
        interpolation=_INTERPOLATION_OF.get(message.interpolation, Interpolation.SLERP),
        sites=reader.sites(f"{_AT}.sites", message.sites or _SITES),
    )


def _read_content(asked: Asked) -> Upload | Named:
    message, fields = asked.request.content_injection, asked.reader.fields
    if message.WhichOneof("content") == "inversion":
        try:
            return Named(inversion_id(message.inversion, f"{_AT}.inversion"))
        except FieldInvalid as error:
            fields.wrong_as(error)
    if message.WhichOneof("content") is None:
        fields.wrong(f"{_AT}.content", "not set; choose one of image, inversion")
    return Upload(asked.reader.image(f"{_AT}.image", message.image))


def _check(asked: Asked, options: ContentInjection) -> None:
    if asked.inversion is not None:
        check_injection(options, asked.inversion)


def check_injection(options: ContentInjection, inversion: InversionOptions) -> None:
    """Raises FieldInvalid where an injection would end before it began."""
    if not injected_steps(options, inversion):
        raise FieldInvalid(
            FieldViolation(
                f"{_AT}.injection_end",
                f"{options.injection_end:g} is not below the inversion's strength, {inversion.strength:g}, by a step: "
                "no content would go in",
            )
        )


def _write(request: EditRequest, options: ContentInjection) -> None:
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


def _write_content(request: EditRequest, content: Injected) -> None:
    if content.name:
        request.content_injection.inversion = inversion_name(content.name)
        return
    assert isinstance(content.source, Photo)  # what is stored has a name
    request.content_injection.image.CopyFrom(images.encode(content.source.pixels))


METHOD = Method(
    options=ContentInjection,
    read=_read,
    write=_write,
    inversion="ddim",
    inversion_strength=_STRENGTH,
    guidance_scale=1.0,
    needs_target=False,
    mask="region",
    read_content=_read_content,
    write_content=_write_content,
    check=_check,
)
