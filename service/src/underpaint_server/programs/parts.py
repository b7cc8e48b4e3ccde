"""Parts that several programs use: prompt embeddings, encoding, generated sources, noise.

Latents and noise are (c, h, w), float64, on the model's device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.diffusion.sampling import Guidance, denoise
from underpaint_server.jobs import Generated, Notice, Photo
from underpaint_server.models import tensors
from underpaint_server.models.facts import Facts
from underpaint_server.models.tensors import digest
from underpaint_server.programs import notices
from underpaint_server.rows import Embed, Encode, Steps, named


@dataclass(frozen=True, slots=True)
class Texts:
    """The embedded prompts of a job."""

    texts: Mapping[str, str]
    """The prompts by role, such as "target_prompt"."""
    embeds: Mapping[str, Tensor]
    """Their embeddings (tokens, width), by role; the same tensor for equal prompts."""
    notices: tuple[Notice, ...]
    """PROMPT_TRUNCATED for each prompt that is longer than the encoder's context, and PROMPT_SYNTAX."""

    def guidance(self, role: str, negative_role: str, scale: float) -> Guidance:
        """Guidance towards the prompt of ``role`` and away from that of ``negative_role``."""
        name = self.texts[role], self.texts[negative_role], scale
        return Guidance(self.embeds[role], self.embeds[negative_role], scale, name)


def embed(**texts: str) -> Steps[Texts]:
    """Embed all prompts of a job, given by role, in one group; equal prompts are embedded once."""
    unique = list(dict.fromkeys(texts.values()))
    answers = dict(zip(unique, (yield [Embed(text) for text in unique]), strict=True))
    truncated = (
        Notice("PROMPT_TRUNCATED", f"{role} is too long for the text encoder; ignored: '{answers[text].dropped}'")
        for role, text in texts.items()
        if answers[text].dropped
    )
    embeds = {role: answers[text].prompt_embeds for role, text in texts.items()}
    return Texts(texts, embeds, (*truncated, *notices.about_syntax(texts)))


def encode(photo: Photo, model: Facts) -> Steps[Tensor]:
    """Encode a photo: latents (c, h, w)."""
    image = tensors.to_device(tensors.image(photo.pixels), model.device)
    answers = yield [Encode(image, name=digest(photo.pixels))]
    latents: Tensor = answers[0]
    return latents


def draw(source: Generated, guidance_scale: float, texts: Texts, model: Facts) -> Steps[Tensor]:
    """Sample a generated source: its latents (c, h, w)."""
    guidance = texts.guidance("source_prompt", "empty", guidance_scale)
    steps = denoise(start(source, model), model.schedule.grid(source.num_inference_steps), guidance)
    return (yield from named(("drawn", source, guidance.name), steps))


def start(source: Generated, model: Facts) -> Tensor:
    """The noise (c, h, w) of a generated source."""
    shape = model.latent_shape(source.width, source.height)
    return tensors.to_device(standard_normal(shape, seed=source.seed, purpose="start"), model.device)


def noise(seed: int, like: Tensor, model: Facts) -> Callable[[str, int], Tensor]:
    """(purpose, index) -> standard normal numbers of a job, in the shape of ``like``. See ``diffusion.noise``."""
    shape = tuple(like.shape)

    def sample(purpose: str, index: int) -> Tensor:
        return tensors.to_device(standard_normal(shape, seed=seed, purpose=purpose, index=index), model.device)

    return sample
