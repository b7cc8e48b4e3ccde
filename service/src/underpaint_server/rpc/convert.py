"""From messages to drafts of jobs: every default filled in, every limit checked, before a pixel is decoded.

A draft lacks only what must be fetched or decoded: pixels or stored latents of the source and of an injected content,
and a given mask. All fields at fault are reported together, by their path in the message. What only one method has is
read in ``methods``.
"""

import secrets
from typing import Any, Final

from underpaint.v1 import edit_service_pb2, inversion_service_pb2

from underpaint_server.jobs import (
    Direction,
    Generated,
    InversionOptions,
    ModelInfo,
)
from underpaint_server.rpc.drafts import DraftSource, EditDraft, InvertDraft, Named, Upload
from underpaint_server.rpc.images import MEDIA_TYPES, PNG
from underpaint_server.rpc.method import Asked, Defaults, Method
from underpaint_server.rpc.methods import METHODS
from underpaint_server.rpc.names import inversion_id
from underpaint_server.rpc.parameters import STRENGTH, WAYS, inversion_options
from underpaint_server.rpc.reading import Reader
from underpaint_server.settings import Settings

# Attention costs the square of this; nothing a caller wants needs more, and a slip of the pen must not fill the device.
_GENERATED_AREA: Final = 4


def edit_draft(
    request: edit_service_pb2.EditRequest, model: ModelInfo, settings: Settings, direction: Direction | None = None
) -> EditDraft:
    """Everything an EditRequest says; ``direction`` is the one it names.

    Raises FieldInvalid, MethodDisabled, DirectionModelMismatch and DirectionStepsMismatch.
    """
    return _Edit(request, Reader(model, settings), direction).draft()


def invert_draft(request: inversion_service_pb2.InvertRequest, model: ModelInfo, settings: Settings) -> InvertDraft:
    """Everything an InvertRequest says; raises FieldInvalid."""
    reader = Reader(model, settings)
    kind = request.parameters.WhichOneof("method")
    if kind is None:
        reader.fields.wrong("parameters.method", "not set; choose edict or ddim")
    if not request.HasField("image"):
        reader.fields.wrong("image", "not set")
    image = reader.image("image", request.image)
    options = inversion_options(reader, request.parameters, kind or "ddim", "parameters", STRENGTH)
    priority = reader.priority(request.priority)
    reader.fields.check()
    return InvertDraft(model, image, options, request.verify, priority)


class _Edit:
    """One EditRequest while it is read."""

    def __init__(self, request: edit_service_pb2.EditRequest, reader: Reader, direction: Direction | None) -> None:
        self._request = request
        self._reader = reader
        self._fields = reader.fields
        self._model = reader.model
        self._direction = direction
        self._kind = self._method_kind()
        self._method: Method[Any] = METHODS[self._kind]
        self._defaults = self._method_defaults()

    def draft(self) -> EditDraft:
        request, reader, method = self._request, self._reader, self._method
        source = self._source()
        inversion = self._source_inversion(source)
        asked = Asked(request, reader, self._direction, source, inversion, self._defaults)
        options = method.read(asked)
        draft = EditDraft(
            model=self._model,
            source=source,
            inversion=inversion,
            method=options,
            content=method.read_content(asked) if method.read_content is not None else None,
            target_prompt=self._target_prompt(source),
            negative_prompt=reader.prompt("negative_prompt", request.negative_prompt),
            guidance_scale=self._guidance(inversion),
            seed=request.seed if request.HasField("seed") else secrets.randbits(63),
            media_type=self._media_type(),
            priority=reader.priority(request.priority),
            mask=method.given_mask(getattr(request, self._kind)),
        )
        self._fields.check()
        if method.check is not None:
            method.check(asked, options)
        return draft

    def _method_kind(self) -> str:
        kind = self._request.WhichOneof("method")
        if kind is None:
            self._fields.wrong("method", f"not set; choose one of {', '.join(self._model.methods)}")
        elif kind not in self._model.methods:
            self._fields.wrong("method", f"{self._model.id} has only {', '.join(self._model.methods)}")
        return kind or "sdedit"

    def _method_defaults(self) -> Defaults:
        if self._method.defaults is None:
            return Defaults(self._model.default_steps)
        return self._method.defaults(self._request, self._reader, self._direction)

    def _source(self) -> DraftSource:
        kind = self._request.WhichOneof("source")
        if kind == "inversion":
            return Named(inversion_id(self._request.inversion, "inversion"))
        if kind == "generated":
            return self._generated()
        if kind is None:
            self._fields.wrong("source", "not set; choose one of image, inversion, generated")
        return Upload(self._reader.image("image", self._request.image))

    def _generated(self) -> Generated:
        asked, model, reader = self._request.generated, self._model, self._reader
        width = self._side("generated.width", asked.width, model.width)
        height = self._side("generated.height", asked.height, model.height)
        area = _GENERATED_AREA * model.width * model.height
        if width * height > area:
            self._fields.wrong("generated", f"{width}x{height} are more than {area} pixels")
        return Generated(
            prompt=reader.prompt("generated.prompt", asked.prompt or self._defaults.source_prompt),
            seed=asked.seed if asked.HasField("seed") else secrets.randbits(63),
            width=width,
            height=height,
            num_inference_steps=reader.steps("generated.steps", asked.steps, self._defaults.steps),
        )

    def _side(self, path: str, value: int, default: int) -> int:
        unit = self._model.size_multiple
        if value < 0 or value % unit:
            self._fields.wrong(path, f"{value} is no positive multiple of {unit} (0 takes {default})")
        return value or default

    def _source_inversion(self, source: DraftSource) -> InversionOptions | None:
        asked, wanted = self._request.inversion_parameters, self._method.inversion
        if wanted is None or not isinstance(source, Upload):
            reason = f"unused by {self._kind}" if wanted is None else "unused: only an image is inverted"
            if asked.ByteSize():
                self._fields.wrong("inversion_parameters", reason)
            return self._generated_inversion(source, wanted) if isinstance(source, Generated) else None
        if asked.WhichOneof("method") not in (None, wanted):
            self._fields.wrong("inversion_parameters.method", f"{self._kind} starts from {wanted}, not from another")
        return inversion_options(self._reader, asked, wanted, "inversion_parameters", self._method.inversion_strength)

    def _generated_inversion(self, source: Generated, wanted: str | None) -> InversionOptions | None:
        """How a drawn picture is inverted, or the inversion that its noise is the end of."""
        if wanted is None:
            return None
        way, encoded = WAYS[wanted], self._method.encodes_drawn
        return InversionOptions(
            method=way.options(),
            num_inference_steps=source.num_inference_steps,
            strength=STRENGTH if encoded else 1.0,
            guidance_scale=self._reader.default_guidance(way.guidance_scale),
            source_prompt="" if encoded else source.prompt,
        )

    def _target_prompt(self, source: DraftSource) -> str:
        asked, needed = self._request.target_prompt or self._defaults.target_prompt, self._method.needs_target
        if not asked and not needed and isinstance(source, Generated):
            return source.prompt
        return self._reader.prompt("target_prompt", asked, required=needed)

    def _guidance(self, inversion: InversionOptions | None) -> float | None:
        if self._request.HasField("guidance_scale"):
            return self._reader.guidance("guidance_scale", self._request.guidance_scale)
        if self._method.guidance_scale is None:
            return inversion.guidance_scale if inversion is not None else None
        if self._defaults.guidance_scale is not None:
            return self._defaults.guidance_scale
        return self._reader.default_guidance(self._method.guidance_scale)

    def _media_type(self) -> str:
        media_type = self._request.output_media_type or PNG
        if media_type not in MEDIA_TYPES:
            self._fields.wrong("output_media_type", f"choose one of {', '.join(MEDIA_TYPES)}")
        return media_type
