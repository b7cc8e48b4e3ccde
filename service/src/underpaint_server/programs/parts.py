"""What the programs of all jobs are made of: texts, pictures, noise, schedules.

Latents are float64 on the model's device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.diffusion.sampling import Guidance, denoise
from underpaint_server.jobs import EditJob, Generated, MaskJob, Notice, Photo
from underpaint_server.methods.task import Context, Editing
from underpaint_server.models import tensors
from underpaint_server.models.facts import Facts
from underpaint_server.rows import Embed, Encode, Steps


@dataclass(frozen=True, slots=True)
class Texts:
    """Embeddings (tokens, width) by the role of their text, and what the encoder could not take in."""

    embeds: Mapping[str, Tensor]
    notices: tuple[Notice, ...]

    def __getitem__(self, role: str) -> Tensor:
        return self.embeds[role]


def embed(**texts: str) -> Steps[Texts]:
    """All texts of a job in one group, each once."""
    unique = list(dict.fromkeys(texts.values()))
    answers = dict(zip(unique, (yield [Embed(text) for text in unique]), strict=True))
    notices = tuple(
        Notice("PROMPT_TRUNCATED", f"{role} is longer than the text encoder reads; not read: '{answers[text].dropped}'")
        for role, text in texts.items()
        if answers[text].dropped
    )
    return Texts({role: answers[text].prompt_embeds for role, text in texts.items()}, notices)


def source_prompt(job: EditJob | MaskJob) -> str:
    """What is known of the source in words."""
    if isinstance(job.source, Generated):
        return job.source.prompt
    return job.inversion.source_prompt if job.inversion is not None else ""


def encode(photo: Photo, model: Facts) -> Steps[Tensor]:
    """A photo as latents (c, h, w)."""
    answers = yield [Encode(tensors.image(photo.pixels).to(model.device))]
    latents: Tensor = answers[0]
    return latents


def draw(source: Generated, guidance_scale: float, texts: Texts, model: Facts) -> Steps[Tensor]:
    """The picture a generated source stands for, as latents (c, h, w)."""
    guidance = Guidance(texts["source_prompt"], texts["empty"], guidance_scale)
    return (yield from denoise(start(source, model), model.schedule.grid(source.num_inference_steps), guidance))


def start(source: Generated, model: Facts) -> Tensor:
    """The noise (c, h, w) that a generated source is drawn from."""
    shape = model.latent_shape(source.width, source.height)
    return standard_normal(shape, seed=source.seed, purpose="start").to(model.device)


def noise(seed: int, like: Tensor, model: Facts) -> Callable[[str, int], Tensor]:
    """(purpose, index) -> the job's standard normal numbers for it, in the shape of ``like``."""
    shape = tuple(like.shape)
    return lambda purpose, index: standard_normal(shape, seed=seed, purpose=purpose, index=index).to(model.device)


def no_noise(purpose: str, index: int) -> Tensor:
    """For a way back that must need none."""
    raise AssertionError(f"a reconstruction draws no noise, but {purpose} {index} was asked for")


def with_extra(
    task: Editing[Any, None],
    extra: Callable[[Editing[Any, None], Context], Steps[Any]] | None,
    context: Context,
) -> Steps[Editing[Any, Any]]:
    """The task with what the method's preparation adds."""
    return task if extra is None else replace(task, extra=(yield from extra(task, context)))
