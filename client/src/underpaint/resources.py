"""Resources that a request refers to by name: inversions and directions."""

from dataclasses import dataclass, field
from datetime import datetime

from underpaint.choices import Sampler
from underpaint.v1 import inversion_service_pb2, types_pb2

_INVERSIONS, _DIRECTIONS = "inversions/", "directions/"


@dataclass(frozen=True, slots=True)
class Origin:
    """What an inversion was made from: enough to make it again after the server has deleted it."""

    image: types_pb2.Image
    parameters: inversion_service_pb2.InversionParameters
    model: str


@dataclass(frozen=True)
class InversionHandle:
    """The name of an inversion, as the source of an edit. If this client made it from a photo and it has expired, the
    client makes it again."""

    name: str
    """"inversions/{sha256}"."""
    origin: Origin | None = field(default=None, repr=False, compare=False, kw_only=True)
    """The photo and the settings; None if this client did not make the inversion."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Direction:
    """A learned edit, for ``Disentangled(direction=...)`` (Wu et al., CVPR 2023)."""

    name: str
    """"directions/{id}"."""
    display_name: str
    model: str
    """"models/{id}" that it was learned on; other weights refuse it."""
    model_digest: str
    """Digest of the weights that it was learned on."""
    source_prompt: str
    """Text before the edit."""
    target_prompt: str
    """Text after the edit."""
    steps: int
    """Steps of the schedule that it was learned for; an edit with it has the same number."""
    weights: tuple[float, ...] = field(repr=False)
    """``steps`` mixing weights, noisiest step first: 1 is the source prompt alone, 0 the target prompt alone."""
    sampler: Sampler
    """Sampler used while learning; an edit takes it unless it names one."""
    guidance_scale: float
    """Guidance weight used while learning; an edit takes it unless it names one."""
    content_features: str
    """Features of the content-preserving loss: "vae" or "vgg16"."""
    method: str
    """How it was learned: "gradient" or "search"; empty for a method that this client does not know."""
    losses: tuple[float, ...] = field(repr=False)
    """Loss before each optimiser step and after the last, or of each candidate; ``weights`` had the smallest."""
    example_count: int
    """Number of images it was learned on."""
    create_time: datetime | None
    """UTC."""
    etag: str
    """Digest of the content; ``delete_direction(name, etag=...)`` deletes the direction only if it has this one."""

    def __str__(self) -> str:
        return self.name


def is_inversion_name(value: object) -> bool:
    """Whether a source or content is the full name of an inversion; other strings are paths of images."""
    return isinstance(value, str) and value.startswith(_INVERSIONS)


def inversion_name(inversion: InversionHandle | str) -> str:
    """ "inversions/{sha256}" of a handle, a name, or a digest alone."""
    name = str(inversion)
    return name if name.startswith(_INVERSIONS) else _INVERSIONS + name


def direction_name(direction: Direction | str) -> str:
    """ "directions/{id}" of a direction, a name, or an id alone."""
    name = str(direction)
    return name if name.startswith(_DIRECTIONS) else _DIRECTIONS + name


def direction_id(name: str) -> str:
    """The id of "directions/{id}", or of an id alone."""
    return name.removeprefix(_DIRECTIONS)
