"""From an EditRequest to a draft of a job: defaults are filled in and limits checked before an image is decoded.

A draft lacks only what must be fetched or decoded: the source's pixels or latents, and what the method completes later.
All invalid fields are reported together, by their path in the message. The fields of one method are read in its folder
under ``methods``.
"""

import secrets
from typing import Final

from underpaint.v1 import edit_service_pb2

from underpaint_server.jobs import Generated, InversionMethod, InversionOptions, ModelInfo
from underpaint_server.methods import METHODS
from underpaint_server.methods.message import DEFAULT_STRENGTH, Defaults, Reading, message_of
from underpaint_server.rpc.requests.inversion import inversion_options
from underpaint_server.settings import Settings
from underpaint_server.wire.drafts import DraftSource, EditDraft, StoredSource, Upload
from underpaint_server.wire.headers import PNG
from underpaint_server.wire.images import MEDIA_TYPES
from underpaint_server.wire.names import inversion_id
from underpaint_server.wire.reader import Reader

_MAX_GENERATED_AREA: Final = 4
"""Largest area of a generated source, relative to the model's own size. Attention costs the square of the area."""


def edit_draft(
    request: edit_service_pb2.EditRequest, model: ModelInfo, settings: Settings, looked_up: object = None
) -> EditDraft:
    """Read an EditRequest; ``looked_up`` is what the method's ``lookup`` returned.

    Raises FieldInvalid with all invalid fields, and what the method's ``check`` raises.
    """
    return _Edit(request, Reader(model, settings), looked_up).draft()


class _Edit:
    """Reads one EditRequest."""

    def __init__(self, request: edit_service_pb2.EditRequest, reader: Reader, looked_up: object) -> None:
        self._request = request
        self._reader = reader
        self._fields = reader.fields
        self._model = reader.model
        self._looked_up = looked_up
        self._name = self._method_name()
        self._method = METHODS[self._name]
        self._message = message_of(self._name)
        self._defaults = self._method_defaults()

    def draft(self) -> EditDraft:
        request, reader, message = self._request, self._reader, self._message
        source = self._source()
        inversion = self._source_inversion(source)
        reading = Reading(request, reader, self._looked_up, source, inversion, self._defaults)
        options = message.read(reading)
        draft = EditDraft(
            model=self._model,
            source=source,
            inversion=inversion,
            method=options,
            target_prompt=self._target_prompt(source),
            negative_prompt=reader.prompt("negative_prompt", request.negative_prompt),
            guidance_scale=self._guidance(inversion),
            seed=request.seed if request.HasField("seed") else secrets.randbits(63),
            media_type=self._media_type(),
            priority=reader.priority(request.priority),
        )
        self._fields.check()
        if message.check is not None:
            message.check(reading, options)
        return draft

    def _method_name(self) -> str:
        name = self._request.WhichOneof("method")
        if name is None:
            self._fields.report("method", f"not set; choose one of {', '.join(self._model.methods)}")
        elif name not in self._model.methods:
            self._fields.report("method", f"{self._model.id} has only {', '.join(self._model.methods)}")
        return name or next(iter(METHODS))

    def _method_defaults(self) -> Defaults:
        if self._message.defaults is None:
            return Defaults(self._model.default_steps)
        return self._message.defaults(self._request, self._reader, self._looked_up)

    def _source(self) -> DraftSource:
        kind = self._request.WhichOneof("source")
        if kind == "inversion":
            name = inversion_id(self._request.inversion, "inversion")
            return StoredSource(name, self._request.inversion_parameters)
        if kind == "generated":
            return self._generated()
        if kind is None:
            self._fields.report("source", "not set; choose one of image, inversion, generated")
        return Upload(self._reader.image("image", self._request.image))

    def _generated(self) -> Generated:
        message, model, reader = self._request.generated, self._model, self._reader
        width = self._side("generated.width", message.width, model.width)
        height = self._side("generated.height", message.height, model.height)
        area = _MAX_GENERATED_AREA * model.width * model.height
        if width * height > area:
            self._fields.report(
                "generated",
                f"{width}x{height} pixels are more than the limit of {area}; choose a smaller width or height",
            )
        return Generated(
            prompt=reader.prompt("generated.prompt", message.prompt or self._defaults.source_prompt),
            seed=message.seed if message.HasField("seed") else secrets.randbits(63),
            width=width,
            height=height,
            num_inference_steps=reader.steps("generated.steps", message.steps, self._defaults.steps),
        )

    def _side(self, path: str, value: int, default: int) -> int:
        unit = self._model.size_multiple
        if value < 0 or value % unit:
            self._fields.report(path, f"{value} is not a positive multiple of {unit} (0 means {default})")
        return value or default

    def _source_inversion(self, source: DraftSource) -> InversionOptions | None:
        parameters, method = self._request.inversion_parameters, self._method.inversion
        if method is not None and isinstance(source, StoredSource):
            return None  # it has its own; they are compared when it is fetched
        if method is None or isinstance(source, Generated):
            if parameters.ByteSize():
                reason = f"{self._name} inverts nothing" if method is None else "a generated image has none"
                self._fields.report("inversion_parameters", f"must be empty: {reason}")
            return self._generated_inversion(source, method) if method and isinstance(source, Generated) else None
        if parameters.WhichOneof("method") not in (None, method.name):
            description = f"{self._name} starts from an inversion by {method.name}; set that one, or none"
            self._fields.report("inversion_parameters.method", description)
        strength = self._message.inversion_strength
        return inversion_options(self._reader, parameters, method, "inversion_parameters", strength)

    def _generated_inversion(self, source: Generated, method: type[InversionMethod]) -> InversionOptions:
        """How a generated source is inverted; if the method starts from noise, the inversion that would end in it."""
        drawn = not self._method.starts_from_noise
        return InversionOptions(
            method=method(),
            num_inference_steps=source.num_inference_steps,
            strength=DEFAULT_STRENGTH if drawn else 1.0,
            guidance_scale=self._reader.default_guidance(method.default_guidance_scale),
            source_prompt="" if drawn else source.prompt,
        )

    def _target_prompt(self, source: DraftSource) -> str:
        prompt, required = self._request.target_prompt or self._defaults.target_prompt, self._message.needs_target
        if not prompt and not required and isinstance(source, Generated):
            return source.prompt
        return self._reader.prompt("target_prompt", prompt, required=required)

    def _guidance(self, inversion: InversionOptions | None) -> float | None:
        if self._request.HasField("guidance_scale"):
            return self._reader.guidance("guidance_scale", self._request.guidance_scale)
        if self._message.guidance_scale is None:
            return inversion.guidance_scale if inversion is not None else None
        if self._defaults.guidance_scale is not None:
            return self._defaults.guidance_scale
        return self._reader.default_guidance(self._message.guidance_scale)

    def _media_type(self) -> str:
        media_type = self._request.output_media_type or PNG
        if media_type not in MEDIA_TYPES:
            self._fields.report("output_media_type", f"choose one of {', '.join(MEDIA_TYPES)}")
        return media_type
