"""Checks of fields that the model and the server's limits decide, for every message that has such a field."""

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
    """What is read of one request for one model; ``fields`` collects what is wrong."""

    def __init__(self, model: ModelInfo, settings: Settings) -> None:
        self.model = model
        self.limits = settings
        self.fields = Fields()

    def prompt(self, path: str, value: str, *, required: bool = False) -> str:
        """A text, empty for a model that reads none."""
        if not self.model.prompt_tokens:
            if value:
                self.fields.wrong(path, f"must be empty: models/{self.model.id} reads no text")
            return value
        return self.fields.text(path, value, self.limits.max_prompt_chars, required=required)

    def guidance(self, path: str, value: float) -> float:
        """A guidance scale, 1 for a model that reads no text."""
        if not self.model.prompt_tokens and value != 1:
            self.fields.wrong(path, f"{value:.7g} is not 1: models/{self.model.id} reads no text to be guided by")
        return self.fields.between(path, value, 0, MAX_GUIDANCE_SCALE)

    def default_guidance(self, scale: float) -> float:
        """``scale`` where the model reads text; elsewhere 1, which is none."""
        return scale if self.model.prompt_tokens else 1.0

    def steps(self, path: str, value: int, default: int | None = None) -> int:
        """A number of steps; 0 takes ``default``, or else the model's."""
        return self.fields.count(path, value, default or self.model.default_steps, self.limits.max_steps)

    def sites(self, path: str, asked: Sequence[str]) -> tuple[str, ...]:
        """Feature sites in the order the network has them, so that no order makes another inversion."""
        model = self.model
        # One more than there are holds a wrong one or one twice; a message has room for millions.
        asked = asked[: len(model.feature_sites) + 1]
        unknown = sorted(set(asked) - set(model.feature_sites))
        if unknown:
            self.fields.wrong(path, f"models/{model.id} has {', '.join(model.feature_sites)}, not {', '.join(unknown)}")
        if len(set(asked)) < len(asked):
            self.fields.wrong(path, "a site is named twice")
        return tuple(site for site in model.feature_sites if site in asked)

    def image(self, path: str, image: types_pb2.Image) -> types_pb2.Image:
        """An image, still encoded."""
        self.fields.known(f"{path}.fit", image.fit, types_pb2.Fit.DESCRIPTOR)
        return image

    def priority(self, value: types_pb2.Priority.ValueType) -> Priority:
        """The priority of a call."""
        self.fields.known("priority", value, types_pb2.Priority.DESCRIPTOR)
        return _PRIORITIES.get(value, Priority.NORMAL)


def sampler_of(fields: Fields, path: str, value: types_pb2.Sampler.ValueType, default: Sampler) -> Sampler:
    """The sampler that a field names, ``default`` where it names none."""
    fields.known(path, value, types_pb2.Sampler.DESCRIPTOR)
    return _SAMPLERS.get(value, default)
