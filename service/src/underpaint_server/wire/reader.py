"""Checks of fields whose limits depend on the model or the settings, for every message that has such a field."""

from collections.abc import Sequence
from typing import Final

from underpaint.v1 import types_pb2

from underpaint_server.jobs import MAX_GUIDANCE_SCALE, ModelInfo, Priority, Sampler
from underpaint_server.settings import Settings
from underpaint_server.wire.fields import Fields

SAMPLERS: Final = {Sampler.DDIM: types_pb2.SAMPLER_DDIM, Sampler.PLMS: types_pb2.SAMPLER_PLMS}
_SAMPLERS: Final = {message: sampler for sampler, message in SAMPLERS.items()}
_PRIORITIES: Final = {
    types_pb2.Priority.Value(f"PRIORITY_{priority.name}"): priority
    for priority in Priority
    if priority is not Priority.LEARNING
}


class Reader:
    """Reads the fields of one request for one model.

    Each method takes a field's path in the request and its value. ``fields`` collects the violations.
    """

    def __init__(self, model: ModelInfo, settings: Settings) -> None:
        self.model = model
        self.limits = settings
        self.fields = Fields()

    @property
    def max_steps(self) -> int:
        """Largest number of steps: the server's limit, or that of the model's schedule."""
        return min(self.limits.max_steps, self.model.max_steps)

    def prompt(self, path: str, value: str, *, required: bool = False) -> str:
        """A prompt; must be empty for a model without a text encoder."""
        if not self.model.prompt_tokens:
            if value:
                self.fields.report(path, f"must be empty: models/{self.model.id} reads no text")
            return value
        return self.fields.text(path, value, self.limits.max_prompt_chars, required=required)

    def guidance(self, path: str, value: float) -> float:
        """A guidance scale in [0, MAX_GUIDANCE_SCALE]; must be 1 for a model without a text encoder."""
        if not self.model.prompt_tokens and value != 1:
            self.fields.report(path, f"must be 1, not {value:.7g}: models/{self.model.id} reads no text")
        return self.fields.between(path, value, 0, MAX_GUIDANCE_SCALE)

    def default_guidance(self, scale: float) -> float:
        """``scale``; for a model without a text encoder 1, which means no guidance."""
        return scale if self.model.prompt_tokens else 1.0

    def steps(self, path: str, value: int, default: int | None = None) -> int:
        """A number of steps; 0 means ``default``, or the model's default if that is None."""
        return self.fields.count(path, value, default or self.model.default_steps, self.max_steps)

    def sites(self, path: str, names: Sequence[str]) -> tuple[str, ...]:
        """Feature sites in the order of the network, so that the order in the request does not change the inversion."""
        model = self.model
        # A message has room for millions of names. One more than the model has already includes a violation.
        names = names[: len(model.feature_sites) + 1]
        unknown = sorted(set(names) - set(model.feature_sites))
        if unknown:
            self.fields.report(
                path, f"models/{model.id} has {', '.join(model.feature_sites)}, not {', '.join(unknown)}"
            )
        if len(set(names)) < len(names):
            self.fields.report(path, "a site is named twice")
        return tuple(site for site in model.feature_sites if site in names)

    def image(self, path: str, image: types_pb2.Image) -> types_pb2.Image:
        """An image, still encoded."""
        self.fields.known(f"{path}.fit", image.fit, types_pb2.Fit.DESCRIPTOR)
        return image

    def priority(self, value: types_pb2.Priority.ValueType) -> Priority:
        """The priority of a call; PRIORITY_NORMAL if unspecified."""
        self.fields.known("priority", value, types_pb2.Priority.DESCRIPTOR)
        return _PRIORITIES.get(value, Priority.NORMAL)


def sampler_of(fields: Fields, path: str, value: types_pb2.Sampler.ValueType, default: Sampler) -> Sampler:
    """The sampler in a field; ``default`` if unspecified."""
    fields.known(path, value, types_pb2.Sampler.DESCRIPTOR)
    return _SAMPLERS.get(value, default)
