"""InversionParameters, read and written. Fields of a single inversion are handled in its folder under ``methods``."""

from collections.abc import Iterator

from google.protobuf.message import Message
from underpaint.v1 import inversion_service_pb2 as messages

from underpaint_server.errors import FieldInvalid, FieldViolation
from underpaint_server.jobs import InversionMethod, InversionOptions
from underpaint_server.methods.message import inversion_message_of
from underpaint_server.wire.reader import Reader


def inversion_options(
    reader: Reader,
    parameters: messages.InversionParameters,
    method: type[InversionMethod],
    path: str,
    default_strength: float,
) -> InversionOptions:
    """Read how to invert by ``method``; ``path`` is the path of the parameters in the request."""
    guidance_scale = reader.default_guidance(method.default_guidance_scale)
    if parameters.HasField("guidance_scale"):
        guidance_scale = reader.guidance(f"{path}.guidance_scale", parameters.guidance_scale)
    strength = parameters.strength if parameters.HasField("strength") else default_strength
    return InversionOptions(
        method=inversion_message_of(method.name).read(reader, parameters, path),
        num_inference_steps=reader.steps(f"{path}.steps", parameters.steps),
        strength=reader.fields.fraction(f"{path}.strength", strength),
        guidance_scale=guidance_scale,
        source_prompt=reader.prompt(f"{path}.source_prompt", parameters.source_prompt),
    )


def inversion_parameters(options: InversionOptions) -> messages.InversionParameters:
    """The message with every field set."""
    message = messages.InversionParameters(
        steps=options.num_inference_steps,
        strength=options.strength,
        guidance_scale=options.guidance_scale,
        source_prompt=options.source_prompt,
    )
    inversion_message_of(options.method.name).write(message, options.method)
    return message


def check_same(parameters: messages.InversionParameters, options: InversionOptions, path: str) -> None:
    """Raise FieldInvalid where a field of ``parameters`` is set and differs from how a stored inversion was made."""
    violations = tuple(_differences(parameters, inversion_parameters(options), path))
    if violations:
        raise FieldInvalid(*violations)


def _differences(given: Message, own: Message, path: str) -> Iterator[FieldViolation]:
    for field, value in given.ListFields():
        inside, its_own = f"{path}.{field.name}", getattr(own, field.name)
        if field.message_type is not None and own.HasField(field.name):
            yield from _differences(value, its_own, inside)
        elif field.message_type is not None or value != its_own:
            yield FieldViolation(inside, "is not the inversion's own; leave it out, or send the image instead")
