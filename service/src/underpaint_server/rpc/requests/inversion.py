"""InversionParameters, read and written. Fields of a single inversion are handled in its folder under ``methods``."""

from underpaint.v1 import inversion_service_pb2 as messages

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
