"""From messages to drafts of jobs: every default filled in, every limit checked, before a pixel is decoded.

A draft lacks only what must be fetched or decoded: pixels or stored latents of the source and of an injected content,
and a given mask. All fields at fault are reported together, by their path in the message.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.message import Message
from underpaint.v1 import edit_service_pb2, inversion_service_pb2, types_pb2

from underpaint_server.errors import (
    DirectionModelMismatch,
    DirectionStepsMismatch,
    FieldInvalid,
    FieldViolation,
)
from underpaint_server.jobs import (
    ContentInjection,
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
    Interpolation,
    InversionOptions,
    ModelInfo,
    Priority,
    Sampler,
    SdEdit,
)
from underpaint_server.plans import injected_steps
from underpaint_server.rpc.fields import Fields, float32, single
from underpaint_server.rpc.images import MEDIA_TYPES, PNG
from underpaint_server.rpc.names import inversion_id, model_name
from underpaint_server.settings import Settings

_INVERSION_OF: Final = {"edict": "edict", "ddim": "ddim", "diffedit": "ddim", "content_injection": "ddim"}
"""Edit method -> the inversion it starts from."""

_MAX_GUIDANCE: Final = 30.0
_EDIT_GUIDANCE: Final = {"sdedit": 3.0, "ddim": 3.0, "diffedit": 5.0, "disentangled": 5.0, "content_injection": 1.0}
_INVERSION_GUIDANCE: Final = {"edict": 3.0, "ddim": 1.0}
_STRENGTH: Final = 0.8
_INJECTION_STRENGTH: Final = 1.0
"""The paper's: an injection draws the source again from noise alone."""
_MIXING: Final = 0.93
_THRESHOLD: Final = 0.5
_MASK_SAMPLES: Final = 10
_MASK_STRENGTH: Final = 0.5
_WEIGHT: Final = 0.3
_INJECTION_END: Final = 0.4
_SITES: Final = ("mid",)
# Attention costs the square of this; nothing a caller wants needs more, and a slip of the pen must not fill the device.
_GENERATED_AREA: Final = 4

_CONVENTIONS: Final = {
    inversion_service_pb2.DDIM_CONVENTION_UNSPECIFIED: DdimConvention.TARGET,
    inversion_service_pb2.DDIM_CONVENTION_TARGET: DdimConvention.TARGET,
    inversion_service_pb2.DDIM_CONVENTION_CURRENT: DdimConvention.CURRENT,
}

_INTERPOLATIONS: Final = {
    edit_service_pb2.INTERPOLATION_UNSPECIFIED: Interpolation.SLERP,
    edit_service_pb2.INTERPOLATION_SLERP: Interpolation.SLERP,
    edit_service_pb2.INTERPOLATION_LERP: Interpolation.LERP,
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
    """A given mask or region is not in it yet."""
    content: Upload | Named | None
    """Whose content is injected, where the method does that."""
    mask: types_pb2.Image | None = field(repr=False)
    """That mask or region."""
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
    options = _inversion(fields, request.parameters, kind or "ddim", "parameters", model, settings, _STRENGTH)
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
        request, fields = self._request, self._fields
        source = self._source()
        inversion = self._source_inversion(source)
        method = self._method(source)
        content = self._content() if isinstance(method, ContentInjection) else None
        target_prompt = self._target_prompt(source)
        negative_prompt = self._prompt("negative_prompt", request.negative_prompt)
        guidance_scale = self._guidance(inversion)
        seed = request.seed if request.HasField("seed") else secrets.randbits(63)
        media_type = self._media_type()
        priority = _priority(fields, request.priority)
        mask = self._mask()
        fields.check()
        if inversion is not None:
            check_injection(method, inversion)
        self._check_direction(source)
        return EditDraft(
            self._model,
            source,
            inversion,
            method,
            content,
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
        return self._prompt(path, value or default)

    def _source_inversion(self, source: DraftSource) -> InversionOptions | None:
        asked, wanted = self._request.inversion_parameters, _INVERSION_OF.get(self._kind)
        if wanted is None or not isinstance(source, Upload):
            reason = f"unused by {self._kind}" if wanted is None else "unused: only an image is inverted"
            _must_be_empty(self._fields, asked, "inversion_parameters", reason)
            return self._generated_inversion(source, wanted) if isinstance(source, Generated) else None
        if asked.WhichOneof("method") not in (None, wanted):
            self._fields.wrong("inversion_parameters.method", f"{self._kind} starts from {wanted}, not from another")
        strength = _INJECTION_STRENGTH if self._kind == "content_injection" else _STRENGTH
        return _inversion(self._fields, asked, wanted, "inversion_parameters", self._model, self._settings, strength)

    def _generated_inversion(self, source: Generated, wanted: str | None) -> InversionOptions | None:
        """A drawn picture is inverted for DiffEdit; for DDIM and EDICT its noise is the end of an inversion."""
        if wanted is None:
            return None
        encoded = self._kind == "diffedit"
        return InversionOptions(
            method=EdictInversion(_MIXING) if wanted == "edict" else DdimInversion(),
            num_inference_steps=source.num_inference_steps,
            strength=_STRENGTH if encoded else 1.0,
            guidance_scale=_INVERSION_GUIDANCE[wanted] if self._model.prompt_tokens else 1.0,
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
            case "content_injection":
                return self._injection(request.content_injection)
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
            reference_prompt=self._prompt("diffedit.reference_prompt", asked.reference_prompt),
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
        most = self._settings.max_steps
        weights = tuple(float32(value) for value in given.values[: most + 1])
        if len(weights) > most:
            self._fields.wrong(path, f"{len(given.values)} weights, more than {most}")
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

    def _injection(self, asked: edit_service_pb2.ContentInjectionEdit) -> ContentInjection:
        fields, at = self._fields, "content_injection"
        weight = asked.weight if asked.HasField("weight") else _WEIGHT
        injection_end = asked.injection_end if asked.HasField("injection_end") else _INJECTION_END
        fields.known(f"{at}.interpolation", asked.interpolation, edit_service_pb2.Interpolation.DESCRIPTOR)
        return ContentInjection(
            weight=fields.between(f"{at}.weight", weight, 0, 1),
            calibration=fields.between(f"{at}.calibration", asked.calibration, 0, 1),
            region=None,
            injection_end=fields.between(f"{at}.injection_end", injection_end, 0, 1),
            every=fields.count(f"{at}.every", asked.every, 1, self._settings.max_steps),
            boosting_start=fields.between(f"{at}.boosting_start", asked.boosting_start, 0, 1),
            interpolation=_INTERPOLATIONS.get(asked.interpolation, Interpolation.SLERP),
            sites=_sites(fields, f"{at}.sites", asked.sites or _SITES, self._model),
        )

    def _content(self) -> Upload | Named:
        asked, at = self._request.content_injection, "content_injection"
        if asked.WhichOneof("content") == "inversion":
            try:
                return Named(inversion_id(asked.inversion, f"{at}.inversion"))
            except FieldInvalid as error:
                self._fields.wrong_as(error)
        if asked.WhichOneof("content") is None:
            self._fields.wrong(f"{at}.content", "not set; choose one of image, inversion")
        _check_fit(self._fields, asked.image, f"{at}.image")
        return Upload(asked.image)

    def _mask(self) -> types_pb2.Image | None:
        if self._request.diffedit.HasField("mask"):
            return self._request.diffedit.mask
        region = self._request.content_injection
        return region.region if region.HasField("region") else None

    def _target_prompt(self, source: DraftSource) -> str:
        asked, injects = self._request.target_prompt, self._kind == "content_injection"
        if self._direction is not None and not asked:
            asked = self._direction.options.target_prompt
        if injects and not asked and isinstance(source, Generated):
            return source.prompt
        return self._prompt("target_prompt", asked, required=not injects)

    def _prompt(self, path: str, value: str, *, required: bool = False) -> str:
        return _prompt(self._fields, path, value, self._model, self._settings, required=required)

    def _guidance(self, inversion: InversionOptions | None) -> float | None:
        if self._request.HasField("guidance_scale"):
            return _guidance(self._fields, "guidance_scale", self._request.guidance_scale, self._model)
        if self._kind == "edict":
            return inversion.guidance_scale if inversion is not None else None
        if self._direction is not None:
            return self._direction.options.guidance_scale
        return _EDIT_GUIDANCE[self._kind] if self._model.prompt_tokens else 1.0

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
    default_strength: float,
) -> InversionOptions:
    strength = asked.strength if asked.HasField("strength") else default_strength
    guidance = _INVERSION_GUIDANCE[kind] if model.prompt_tokens else 1.0
    if asked.HasField("guidance_scale"):
        guidance = _guidance(fields, f"{path}.guidance_scale", asked.guidance_scale, model)
    return InversionOptions(
        method=_INVERSIONS[kind](fields, asked, path, model),
        num_inference_steps=fields.count(f"{path}.steps", asked.steps, model.default_steps, settings.max_steps),
        strength=fields.share(f"{path}.strength", strength),
        guidance_scale=guidance,
        source_prompt=_prompt(fields, f"{path}.source_prompt", asked.source_prompt, model, settings),
    )


def check_injection(method: EditMethod, inversion: InversionOptions) -> None:
    """Raises FieldInvalid where an injection would end before it began."""
    if isinstance(method, ContentInjection) and not injected_steps(method, inversion):
        raise FieldInvalid(
            FieldViolation(
                "content_injection.injection_end",
                f"{method.injection_end:g} is not below the inversion's strength, {inversion.strength:g}, by a step: "
                "no content would go in",
            )
        )


def _edict(
    fields: Fields, asked: inversion_service_pb2.InversionParameters, path: str, model: ModelInfo
) -> EdictInversion:
    del model
    mixing = asked.edict.mixing_weight if asked.edict.HasField("mixing_weight") else _MIXING
    return EdictInversion(fields.share(f"{path}.edict.mixing_weight", mixing))


def _ddim(
    fields: Fields, asked: inversion_service_pb2.InversionParameters, path: str, model: ModelInfo
) -> DdimInversion:
    convention = asked.ddim.convention
    fields.known(f"{path}.ddim.convention", convention, inversion_service_pb2.DdimConvention.DESCRIPTOR)
    features = _sites(fields, f"{path}.ddim.features", asked.ddim.features, model)
    return DdimInversion(_CONVENTIONS.get(convention, DdimConvention.TARGET), features)


_Parameters = inversion_service_pb2.InversionParameters
_Inverter = Callable[[Fields, _Parameters, str, ModelInfo], EdictInversion | DdimInversion]
_INVERSIONS: Final[dict[str, _Inverter]] = {"edict": _edict, "ddim": _ddim}


def _sites(fields: Fields, path: str, asked: Sequence[str], model: ModelInfo) -> tuple[str, ...]:
    """Feature sites in the order the network has them, so that no order makes another inversion."""
    # One more than there are holds a wrong one or one twice; a message has room for millions.
    asked = asked[: len(model.feature_sites) + 1]
    unknown = sorted(set(asked) - set(model.feature_sites))
    if unknown:
        fields.wrong(path, f"models/{model.id} has {', '.join(model.feature_sites)}, not {', '.join(unknown)}")
    if len(set(asked)) < len(asked):
        fields.wrong(path, "a site is named twice")
    return tuple(site for site in model.feature_sites if site in asked)


def _prompt(
    fields: Fields, path: str, value: str, model: ModelInfo, settings: Settings, *, required: bool = False
) -> str:
    if not model.prompt_tokens:
        if value:
            fields.wrong(path, f"must be empty: models/{model.id} reads no text")
        return value
    return fields.text(path, value, settings.max_prompt_chars, required=required)


def _guidance(fields: Fields, path: str, value: float, model: ModelInfo) -> float:
    if not model.prompt_tokens and value != 1:
        fields.wrong(path, f"{value:.7g} is not 1: models/{model.id} reads no text to be guided by")
    return fields.between(path, value, 0, _MAX_GUIDANCE)


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
