"""The message of disentangled edits in EditRequest: weights of a direction, a list of weights, or a switch step."""

from dataclasses import replace
from typing import Final

from underpaint.v1.edit_service_pb2 import DisentangledEdit as DisentangledMessage
from underpaint.v1.edit_service_pb2 import EditRequest, MixingWeights

from underpaint_server.errors import DirectionModelMismatch, DirectionStepsMismatch
from underpaint_server.jobs import MAX_MIXING_WEIGHT, Direction, Generated, Sampler, Stored
from underpaint_server.methods.disentangled.options import DisentangledEdit, step_weights
from underpaint_server.methods.message import Completing, Defaults, Fetch, Message, Reading
from underpaint_server.wire.drafts import EditSource
from underpaint_server.wire.fields import float32, nearest_float32
from underpaint_server.wire.names import direction_id, model_name
from underpaint_server.wire.reader import SAMPLERS, Reader, sampler_of

_SCALES: Final = (-2.0, 4.0)


async def _lookup(request: EditRequest, fetch: Fetch) -> Direction | None:
    """The direction that the request names; raises FieldInvalid, DirectionNotFound, StoreCorrupt, StoreUnavailable."""
    if request.disentangled.WhichOneof("weights") != "direction":
        return None
    return await fetch.direction(direction_id(request.disentangled.direction, "disentangled.direction"))


def _defaults(request: EditRequest, reader: Reader, direction: Direction | None) -> Defaults:
    """With a direction, the values it was learned with; with a list of weights, as many steps as there are weights."""
    if direction is None:
        return Defaults(len(request.disentangled.given.values) or reader.model.default_steps)
    learned = direction.options
    return Defaults(learned.num_inference_steps, learned.source_prompt, learned.target_prompt, learned.guidance_scale)


def _read(reading: Reading) -> DisentangledEdit:
    message, fields = reading.request.disentangled, reading.reader.fields
    source_prompt = _source_prompt(reading)
    weights = _weights(reading, _steps(reading))
    scale = fields.between("disentangled.scale", message.scale if message.HasField("scale") else 1.0, *_SCALES)
    default = reading.looked_up.options.sampler if reading.looked_up is not None else Sampler.DDIM
    sampler = sampler_of(fields, "disentangled.sampler", message.sampler, default)
    if scale != 1:
        weights = tuple(1 - scale * (1 - weight) for weight in weights)
        if not all(abs(weight) <= MAX_MIXING_WEIGHT for weight in weights):
            fields.report(
                "disentangled.scale",
                f"{scale:g} brings a weight outside [-{MAX_MIXING_WEIGHT:g}, {MAX_MIXING_WEIGHT:g}]; use one near 1",
            )
            weights = ()
    # Rounded to float32 as in a message, so that ``resolved`` has exactly these weights.
    return DisentangledEdit(source_prompt, tuple(float32(nearest_float32(weight)) for weight in weights), sampler)


def _source_prompt(reading: Reading) -> str:
    message = reading.request.disentangled
    if isinstance(reading.source, Generated):
        for name, other in (("source_prompt", "generated.prompt"), ("steps", "generated.steps")):
            if getattr(message, name):
                reading.reader.fields.report(f"disentangled.{name}", f"must be unset: {other} is used instead")
        return reading.source.prompt
    return reading.reader.prompt("disentangled.source_prompt", message.source_prompt or reading.defaults.source_prompt)


def _steps(reading: Reading) -> int:
    if isinstance(reading.source, Generated):
        return reading.source.num_inference_steps
    return reading.reader.steps("disentangled.steps", reading.request.disentangled.steps, reading.defaults.steps)


def _weights(reading: Reading, steps: int) -> tuple[float, ...]:
    """One weight per step, before the scale. A direction learned for another number of steps is refused in
    ``_check``."""
    message: DisentangledMessage = reading.request.disentangled
    reader, fields = reading.reader, reading.reader.fields
    match message.WhichOneof("weights"):
        case "direction":
            direction: Direction = reading.looked_up
            weights, limit = direction.weights, reader.max_steps
            if len(weights) > limit:
                fields.report("disentangled.direction", f"has {len(weights)} steps, more than {limit}")
            return weights
        case "switch_step":
            switch_step = fields.index("disentangled.switch_step", message.switch_step, steps)
            return step_weights(steps, switch_step, 0.0)
        case "given":
            return _given(reader, message.given, steps)
        case _:
            fields.report("disentangled.weights", "not set; choose one of direction, switch_step, given")
            return ()


def _given(reader: Reader, given: MixingWeights, steps: int) -> tuple[float, ...]:
    path, fields, limit = "disentangled.given.values", reader.fields, reader.max_steps
    weights = tuple(float32(value) for value in given.values[: limit + 1])
    if len(weights) > limit:
        fields.report(path, f"{len(given.values)} weights, more than {limit} steps")
        return ()
    if len(weights) != steps:
        fields.report(path, f"{len(weights)} weights for {steps} steps; give one per step")
    elif not all(-MAX_MIXING_WEIGHT <= weight <= MAX_MIXING_WEIGHT for weight in weights):  # also refuses NaN
        fields.report(path, f"a weight is outside [-{MAX_MIXING_WEIGHT:g}, {MAX_MIXING_WEIGHT:g}]")
        return ()
    return weights


def _check(reading: Reading, _options: DisentangledEdit) -> None:
    """Raises DirectionModelMismatch and DirectionStepsMismatch."""
    direction, model = reading.looked_up, reading.reader.model
    if direction is None:
        return
    metadata = {"resource_name": reading.request.disentangled.direction}
    if direction.model_digest != model.digest:
        raise DirectionModelMismatch(
            f"{metadata['resource_name']} was learned with other weights than those of {model_name(model.id)}; learn"
            " it on this model, or set model to the one it was learned on",
            metadata=metadata,
        )
    learned, steps = direction.options.num_inference_steps, _steps(reading)
    if learned != steps:
        raise DirectionStepsMismatch(
            f"{metadata['resource_name']} was learned for {learned} steps, not for {steps}; leave steps unset",
            metadata={**metadata, "steps": str(learned)},
        )


async def _complete(options: DisentangledEdit, completing: Completing) -> tuple[DisentangledEdit, None]:
    """The options; an empty source prompt is replaced by that of a stored inversion."""
    source = completing.source.source
    if not options.source_prompt and isinstance(source, Stored):
        options = replace(options, source_prompt=source.inversion.options.source_prompt)
    return options, None


def _write(request: EditRequest, options: DisentangledEdit, _source: EditSource) -> None:
    message = request.disentangled
    message.given.values.extend(options.weights)
    message.scale = 1
    message.sampler = SAMPLERS[options.sampler]
    if request.WhichOneof("source") != "generated":  # it has both fields itself
        message.source_prompt = options.source_prompt
        message.steps = len(options.weights)


MESSAGE = Message(
    read=_read,
    write=_write,
    guidance_scale=5.0,
    lookup=_lookup,
    defaults=_defaults,
    check=_check,
    complete=_complete,
)
