"""InversionParameters both ways; and the table of the inversions there are.

Adding an inversion: its reader here, its line in ``WAYS``, its case in ``parameters``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from underpaint.v1 import inversion_service_pb2 as messages

from underpaint_server.jobs import DdimConvention, DdimInversion, EdictInversion, InversionOptions
from underpaint_server.rpc.reading import Reader

STRENGTH: Final = 0.8
"""How far a picture is inverted or noised unless told."""

_CONVENTIONS: Final = {
    DdimConvention.TARGET: messages.DDIM_CONVENTION_TARGET,
    DdimConvention.CURRENT: messages.DDIM_CONVENTION_CURRENT,
}
_CONVENTION_OF: Final = {message: convention for convention, message in _CONVENTIONS.items()}


def inversion_options(
    reader: Reader, asked: messages.InversionParameters, kind: str, path: str, default_strength: float
) -> InversionOptions:
    """How to invert, by the inversion ``kind`` of ``WAYS``; ``path`` is the message's in the request."""
    strength = asked.strength if asked.HasField("strength") else default_strength
    way = WAYS[kind]
    guidance = reader.default_guidance(way.guidance_scale)
    if asked.HasField("guidance_scale"):
        guidance = reader.guidance(f"{path}.guidance_scale", asked.guidance_scale)
    return InversionOptions(
        method=way.read(reader, asked, path),
        num_inference_steps=reader.steps(f"{path}.steps", asked.steps),
        strength=reader.fields.share(f"{path}.strength", strength),
        guidance_scale=guidance,
        source_prompt=reader.prompt(f"{path}.source_prompt", asked.source_prompt),
    )


def parameters(options: InversionOptions) -> messages.InversionParameters:
    """Inversion parameters with nothing left to default."""
    message = messages.InversionParameters(
        steps=options.num_inference_steps,
        strength=options.strength,
        guidance_scale=options.guidance_scale,
        source_prompt=options.source_prompt,
    )
    match options.method:
        case EdictInversion(mixing_coefficient=mixing):
            message.edict.mixing_coefficient = mixing
        case DdimInversion(convention=convention, features=features):
            message.ddim.convention = _CONVENTIONS[convention]
            message.ddim.features.extend(features)
    return message


def _edict(reader: Reader, asked: messages.InversionParameters, path: str) -> EdictInversion:
    mixing = (
        asked.edict.mixing_coefficient
        if asked.edict.HasField("mixing_coefficient")
        else EdictInversion().mixing_coefficient
    )
    return EdictInversion(reader.fields.share(f"{path}.edict.mixing_coefficient", mixing))


def _ddim(reader: Reader, asked: messages.InversionParameters, path: str) -> DdimInversion:
    convention = asked.ddim.convention
    reader.fields.known(f"{path}.ddim.convention", convention, messages.DdimConvention.DESCRIPTOR)
    features = reader.sites(f"{path}.ddim.features", asked.ddim.features)
    return DdimInversion(_CONVENTION_OF.get(convention, DdimConvention.TARGET), features)


@dataclass(frozen=True, slots=True)
class Way:
    """One inversion."""

    options: type[EdictInversion] | type[DdimInversion]
    guidance_scale: float
    """Unless told."""
    read: Callable[[Reader, messages.InversionParameters, str], EdictInversion | DdimInversion]


WAYS: Final[Mapping[str, Way]] = {
    "edict": Way(EdictInversion, 3.0, _edict),
    "ddim": Way(DdimInversion, 1.0, _ddim),
}
"""Field of InversionParameters -> the inversion."""
