"""From messages to drafts of jobs: every default filled in, every limit checked, before a pixel is decoded.

A draft lacks only what must be fetched or decoded: the source's pixels or stored latents, and a given mask. All fields
at fault are reported together, by their path in the message.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.message import Message
from underpaint.v1 import edit_service_pb2, inversion_service_pb2, types_pb2

from underpaint_server.errors import DirectionModelMismatch, DirectionStepsMismatch, MethodDisabled
from underpaint_server.jobs import (
    DdimConvention,
    DdimEdit,
    DdimInversion,
    DiffEdit,
    Direction,
    DisentangledEdit,
    EdictEdit,
    EdictInversion,
    EditMethod,
    Generated,
    InversionOptions,
    ModelInfo,
    Priority,
    Sampler,
    SdEdit,
)
from underpaint_server.rpc.fields import Fields, float32, single
from underpaint_server.rpc.images import MEDIA_TYPES, PNG
from underpaint_server.rpc.names import inversion_id, model_name
from underpaint_server.settings import Settings

_LATER: Final = ("content_injection",)
_INVERSION_OF: Final = {"edict": "edict", "ddim": "ddim", "diffedit": "ddim"}
"""Edit method -> the inversion it starts from."""

_MAX_GUIDANCE: Final = 30.0
_EDIT_GUIDANCE: Final = {"sdedit": 3.0, "ddim": 3.0, "diffedit": 5.0, "disentangled": 5.0}
_INVERSION_GUIDANCE: Final = {"edict": 3.0, "ddim": 1.0}
_STRENGTH: Final = 0.8
_MIXING: Final = 0.93
_THRESHOLD: Final = 0.5
_MASK_SAMPLES: Final = 10
_MASK_STRENGTH: Final = 0.5
# Attention costs the square of this; nothing a caller wants needs more, and a slip of the pen must not fill the device.
_GENERATED_AREA: Final = 4

_CONVENTIONS: Final = {
    inversion_service_pb2.DDIM_CONVENTION_UNSPECIFIED: DdimConvention.TARGET,
    inversion_service_pb2.DDIM_CONVENTION_TARGET: DdimConvention.TARGET,
    inversion_service_pb2.DDIM_CONVENTION_CURRENT: DdimConvention.CURRENT,
}

MAX_WEIGHT: Final = 1000.0
"""Of a mixing weight, either way; what can be learned at all stays far below."""
_SCALES: Final = (-2.0, 4.0)

SAMPLERS: Final = {Sampler.DDIM: types_pb2.SAMPLER_DDIM, Sampler.PLMS: types_pb2.SAMPLER_PLMS}
_SAMPLERS: Final = {message: sampler for sampler, message in SAMPLERS.items()}
_PRIORITIES: Final = {
    types_pb2.Priority.Value(f"PRIORITY_{priority.name}"): priority
    for priority in Priority
    if priority is not Priority.LEARNING
}


@dataclass(frozen=True, slots=True)
class Upload:
    """An image that came with the request."""

    image: types_pb2.Image = field(repr=False)


@dataclass(frozen=True, slots=True)
class Named:
    """An inversion that the store is asked for."""

    inversion: str
    """64 hexadecimal digits."""


DraftSource = Upload | Named | Generated


@dataclass(frozen=True, slots=True)
class EditDraft:
    """An edit, or the mask of one."""

    model: ModelInfo
    source: DraftSource
    inversion: InversionOptions | None
    """How to invert the source; None where nothing is, and for a named inversion, which knows itself."""
    method: EditMethod
    """A given mask is not in it yet."""
    mask: types_pb2.Image | None = field(repr=False)
    target_prompt: str
    negative_prompt: str
    guidance_scale: float | None
    """None takes the inversion's."""
    seed: int
    media_type: str
    priority: Priority


@dataclass(frozen=True, slots=True)
class InvertDraft:
    """An inversion."""

    model: ModelInfo
    image: types_pb2.Image = field(repr=False)
    options: InversionOptions
    verify: bool
    priority: Priority


def edit_draft(
    request: edit_service_pb2.EditRequest, model: ModelInfo, settings: Settings, direction: Direction | None = None
) -> EditDraft:
    """Everything an EditRequest says; ``direction`` is the one it names.

    Raises FieldInvalid, MethodDisabled, DirectionModelMismatch and DirectionStepsMismatch.
    """
    return _Edit(request, model, settings, direction).draft()


def invert_draft(request: inversion_service_pb2.InvertRequest, model: ModelInfo, settings: Settings) -> InvertDraft:
    """Everything an InvertRequest says; raises FieldInvalid."""
    fields = Fields()
    kind = request.parameters.WhichOneof("method")
    if kind is None:
        fields.wrong("parameters.method", "not set; choose edict or ddim")
    if not request.HasField("image"):
        fields.wrong("image", "not set")
    _check_fit(fields, request.image, "image")
    options = _inversion(fields, request.parameters, kind or "ddim", "parameters", model, settings)
    priority = _priority(fields, request.priority)
    fields.check()
    return InvertDraft(model, request.image, options, request.verify, priority)


class _Edit:
    """One EditRequest while it is read."""

    def __init__(
        self,
        request: edit_service_pb2.EditRequest,
        model: ModelInfo,
        settings: Settings,
        direction: Direction | None,
    ) -> None:
        self._request = request
        self._model = model
        self._settings = settings
        self._direction = direction
        self._fields = Fields()
        self._kind = self._method_kind()

    def draft(self) -> EditDraft:
        request, fields, limit = self._request, self._fields, self._settings.max_prompt_chars
        source = self._source()
        inversion = self._source_inversion(source)
        method = self._method(source)
        target_prompt = self._direction.options.target_prompt if self._direction is not None else ""
        target_prompt = fields.text("target_prompt", request.target_prompt or target_prompt, limit, required=True)
        negative_prompt = fields.text("negative_prompt", request.negative_prompt, limit)
        guidance_scale = self._guidance(inversion)
        seed = request.seed if request.HasField("seed") else secrets.randbits(63)
        media_type = self._media_type()
        priority = _priority(fields, request.priority)
        mask = request.diffedit.mask if request.diffedit.HasField("mask") else None
        fields.check()
        self._check_direction(source)
        return EditDraft(
            self._model,
            source,
            inversion,
            method,
            mask,
            target_prompt,
            negative_prompt,
            guidance_scale,
            seed,
            media_type,
            priority,
        )

    def _method_kind(self) -> str:
        kind = self._request.WhichOneof("method")
        if kind in _LATER:
            raise MethodDisabled(f"{kind} is not offered by this server; it has {', '.join(self._model.methods)}")
        if kind is None:
            self._fields.wrong("method", f"not set; choose one of {', '.join(self._model.methods)}")
        elif kind not in self._model.methods:
            self._fields.wrong("method", f"{self._model.id} has only {', '.join(self._model.methods)}")
        return kind or "sdedit"

    def _source(self) -> DraftSource:
        kind = self._request.WhichOneof("source")
        if kind == "inversion":
            return Named(inversion_id(self._request.inversion, "inversion"))
        if kind == "generated":
            return self._generated()
        if kind is None:
            self._fields.wrong("source", "not set; choose one of image, inversion, generated")
        _check_fit(self._fields, self._request.image, "image")
        return Upload(self._request.image)

    def _generated(self) -> Generated:
        asked, model = self._request.generated, self._model
        width = self._side("generated.width", asked.width, model.width)
        height = self._side("generated.height", asked.height, model.height)
        area = _GENERATED_AREA * model.width * model.height
        if width * height > area:
            self._fields.wrong("generated", f"{width}x{height} are more than {area} pixels")
        return Generated(
            prompt=self._source_prompt("generated.prompt", asked.prompt),
            seed=asked.seed if asked.HasField("seed") else secrets.randbits(63),
            width=width,
            height=height,
            num_inference_steps=self._steps("generated.steps", asked.steps),
        )

    def _side(self, path: str, value: int, default: int) -> int:
        unit = self._model.size_multiple
        if value < 0 or value % unit:
            self._fields.wrong(path, f"{value} is no positive multiple of {unit} (0 takes {default})")
        return value or default

    def _steps(self, path: str, value: int) -> int:
        return self._fields.count(path, value, self._default_steps(), self._settings.max_steps)

    def _default_steps(self) -> int:
        """As many as there are weights, where they come as a list; else the model's default."""
        if self._direction is not None:
            return self._direction.options.num_inference_steps
        return len(self._request.disentangled.given.values) or self._model.default_steps

    def _source_prompt(self, path: str, value: str) -> str:
        default = self._direction.options.source_prompt if self._direction is not None else ""
        return self._fields.text(path, value or default, self._settings.max_prompt_chars)

    def _source_inversion(self, source: DraftSource) -> InversionOptions | None:
        asked, wanted = self._request.inversion_parameters, _INVERSION_OF.get(self._kind)
        if wanted is None or not isinstance(source, Upload):
            reason = f"unused by {self._kind}" if wanted is None else "unused: only an image is inverted"
            _must_be_empty(self._fields, asked, "inversion_parameters", reason)
            return self._generated_inversion(source, wanted) if isinstance(source, Generated) else None
        if asked.WhichOneof("method") not in (None, wanted):
            self._fields.wrong("inversion_parameters.method", f"{self._kind} starts from {wanted}, not from another")
        return _inversion(self._fields, asked, wanted, "inversion_parameters", self._model, self._settings)

    def _generated_inversion(self, source: Generated, wanted: str | None) -> InversionOptions | None:
        """A drawn picture is inverted for DiffEdit; for DDIM and EDICT its noise is the end of an inversion."""
        if wanted is None:
            return None
        encoded = self._kind == "diffedit"
        return InversionOptions(
            method=EdictInversion(_MIXING) if wanted == "edict" else DdimInversion(),
            num_inference_steps=source.num_inference_steps,
            strength=_STRENGTH if encoded else 1.0,
            guidance_scale=_INVERSION_GUIDANCE[wanted],
            source_prompt="" if encoded else source.prompt,
        )

    def _method(self, source: DraftSource) -> EditMethod:
        request = self._request
        match self._kind:
            case "ddim":
                return DdimEdit()
            case "edict":
                return EdictEdit()
            case "diffedit":
                return self._diffedit(request.diffedit)
            case "disentangled":
                return self._disentangled(request.disentangled, source)
            case _:
                strength = request.sdedit.strength if request.sdedit.HasField("strength") else _STRENGTH
                return SdEdit(
                    strength=self._fields.share("sdedit.strength", strength),
                    num_inference_steps=self._steps("sdedit.steps", request.sdedit.steps),
                )

    def _diffedit(self, asked: edit_service_pb2.DiffEdit) -> DiffEdit:
        fields, limits = self._fields, self._settings
        if asked.HasField("mask"):
            for descriptor, _ in asked.ListFields():
                if descriptor.name != "mask":
                    fields.wrong(f"diffedit.{descriptor.name}", "unused: a mask is given")
        threshold = asked.threshold if asked.HasField("threshold") else _THRESHOLD
        mask_strength = asked.mask_strength if asked.HasField("mask_strength") else _MASK_STRENGTH
        return DiffEdit(
            mask=None,
            threshold=fields.share("diffedit.threshold", threshold, below_one=True),
            samples=fields.count("diffedit.samples", asked.samples, _MASK_SAMPLES, limits.max_mask_samples),
            mask_strength=fields.share("diffedit.mask_strength", mask_strength, below_one=True),
            reference_prompt=fields.text("diffedit.reference_prompt", asked.reference_prompt, limits.max_prompt_chars),
        )

    def _disentangled(self, asked: edit_service_pb2.DisentangledEdit, source: DraftSource) -> DisentangledEdit:
        fields = self._fields
        if isinstance(source, Generated):
            for name, said_by in (("source_prompt", "generated.prompt"), ("steps", "generated.steps")):
                if getattr(asked, name):
                    fields.wrong(f"disentangled.{name}", f"unused: {said_by} says it")
            source_prompt = source.prompt
        else:
            source_prompt = self._source_prompt("disentangled.source_prompt", asked.source_prompt)
        weights = self._weights(asked, self._mixing_steps(source))
        scale = fields.between("disentangled.scale", asked.scale if asked.HasField("scale") else 1.0, *_SCALES)
        default = self._direction.options.sampler if self._direction is not None else Sampler.DDIM
        sampler = sampler_of(fields, "disentangled.sampler", asked.sampler, default)
        if scale != 1:
            weights = tuple(1 - scale * (1 - weight) for weight in weights)
            if not all(abs(weight) <= MAX_WEIGHT for weight in weights):
                fields.wrong("disentangled.scale", f"{scale:g} takes a weight out of [-{MAX_WEIGHT:g}, {MAX_WEIGHT:g}]")
                weights = ()
        # To the precision of the wire, so that ``resolved`` has these very weights.
        return DisentangledEdit(source_prompt, tuple(float32(single(weight)) for weight in weights), sampler)

    def _mixing_steps(self, source: DraftSource) -> int:
        if isinstance(source, Generated):
            return source.num_inference_steps
        return self._steps("disentangled.steps", self._request.disentangled.steps)

    def _weights(self, asked: edit_service_pb2.DisentangledEdit, steps: int) -> tuple[float, ...]:
        """One a step, before the scale. A direction of other steps is refused later: the fields come first."""
        fields = self._fields
        match asked.WhichOneof("weights"):
            case "direction":
                assert self._direction is not None
                learned, most = self._direction.weights, self._settings.max_steps
                if len(learned) > most:
                    fields.wrong("disentangled.direction", f"has {len(learned)} steps, more than {most}")
                return learned
            case "switch_step":
                switch_step = fields.index("disentangled.switch_step", asked.switch_step, steps)
                return (1.0,) * switch_step + (0.0,) * (steps - switch_step)
            case "given":
                return self._given(asked.given, steps)
            case _:
                fields.wrong("disentangled.weights", "not set; choose one of direction, switch_step, given")
                return ()

    def _given(self, given: edit_service_pb2.MixingWeights, steps: int) -> tuple[float, ...]:
        path = "disentangled.given.values"
        weights = tuple(float32(value) for value in given.values)
        most = self._settings.max_steps
        if len(weights) > most:
            self._fields.wrong(path, f"{len(weights)} weights, more than {most}")
            return ()
        if len(weights) != steps:
            self._fields.wrong(path, f"{len(weights)} weights for {steps} steps")
        elif not all(-MAX_WEIGHT <= weight <= MAX_WEIGHT for weight in weights):  # which no NaN is
            self._fields.wrong(path, f"one is outside [-{MAX_WEIGHT:g}, {MAX_WEIGHT:g}]")
            return ()
        return weights

    def _check_direction(self, source: DraftSource) -> None:
        direction, model = self._direction, self._model
        if direction is None:
            return
        metadata = {"resource_name": self._request.disentangled.direction}
        if direction.model_digest != model.digest:
            raise DirectionModelMismatch(
                f"{metadata['resource_name']} was learned on other weights than those of {model_name(model.id)}: learn"
                " it there, or name its model",
                metadata=metadata,
            )
        learned, asked = direction.options.num_inference_steps, self._mixing_steps(source)
        if learned != asked:
            raise DirectionStepsMismatch(
                f"{metadata['resource_name']} was learned for {learned} steps, not for {asked}; leave the steps out",
                metadata={**metadata, "steps": str(learned)},
            )

    def _guidance(self, inversion: InversionOptions | None) -> float | None:
        if self._request.HasField("guidance_scale"):
            return self._fields.between("guidance_scale", self._request.guidance_scale, 0, _MAX_GUIDANCE)
        if self._kind == "edict":
            return inversion.guidance_scale if inversion is not None else None
        if self._direction is not None:
            return self._direction.options.guidance_scale
        return _EDIT_GUIDANCE[self._kind]

    def _media_type(self) -> str:
        media_type = self._request.output_media_type or PNG
        if media_type not in MEDIA_TYPES:
            self._fields.wrong("output_media_type", f"choose one of {', '.join(MEDIA_TYPES)}")
        return media_type


def _inversion(
    fields: Fields,
    asked: inversion_service_pb2.InversionParameters,
    kind: str,
    path: str,
    model: ModelInfo,
    settings: Settings,
) -> InversionOptions:
    strength = asked.strength if asked.HasField("strength") else _STRENGTH
    guidance = asked.guidance_scale if asked.HasField("guidance_scale") else _INVERSION_GUIDANCE[kind]
    return InversionOptions(
        method=_INVERSIONS[kind](fields, asked, path),
        num_inference_steps=fields.count(f"{path}.steps", asked.steps, model.default_steps, settings.max_steps),
        strength=fields.share(f"{path}.strength", strength),
        guidance_scale=fields.between(f"{path}.guidance_scale", guidance, 0, _MAX_GUIDANCE),
        source_prompt=fields.text(f"{path}.source_prompt", asked.source_prompt, settings.max_prompt_chars),
    )


def _edict(fields: Fields, asked: inversion_service_pb2.InversionParameters, path: str) -> EdictInversion:
    mixing = asked.edict.mixing_weight if asked.edict.HasField("mixing_weight") else _MIXING
    return EdictInversion(fields.share(f"{path}.edict.mixing_weight", mixing))


def _ddim(fields: Fields, asked: inversion_service_pb2.InversionParameters, path: str) -> DdimInversion:
    convention = asked.ddim.convention
    fields.known(f"{path}.ddim.convention", convention, inversion_service_pb2.DdimConvention.DESCRIPTOR)
    return DdimInversion(_CONVENTIONS.get(convention, DdimConvention.TARGET))


_Inverter = Callable[[Fields, inversion_service_pb2.InversionParameters, str], EdictInversion | DdimInversion]
_INVERSIONS: Final[dict[str, _Inverter]] = {"edict": _edict, "ddim": _ddim}


def _check_fit(fields: Fields, image: types_pb2.Image, path: str) -> None:
    fields.known(f"{path}.fit", image.fit, types_pb2.Fit.DESCRIPTOR)


def sampler_of(fields: Fields, path: str, value: types_pb2.Sampler.ValueType, default: Sampler) -> Sampler:
    """The sampler that a field names, ``default`` where it names none."""
    fields.known(path, value, types_pb2.Sampler.DESCRIPTOR)
    return _SAMPLERS.get(value, default)


def _priority(fields: Fields, value: types_pb2.Priority.ValueType) -> Priority:
    fields.known("priority", value, types_pb2.Priority.DESCRIPTOR)
    return _PRIORITIES.get(value, Priority.NORMAL)


def _must_be_empty(fields: Fields, message: Message, path: str, reason: str) -> None:
    if message.ByteSize():
        fields.wrong(path, reason)
