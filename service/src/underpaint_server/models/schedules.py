"""A checkpoint's scheduler configuration as a :class:`Schedule` and as what the network predicts.

Which scheduler a pipeline names does not decide how this server samples, but it says what the network was trained for.
Only the classes of :data:`CLASSES` have noise levels that are given by betas, and only these are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from underpaint_server.diffusion.ddim import epsilon_from_v, epsilon_from_x0
from underpaint_server.diffusion.schedule import Schedule, Spacing, cumulate, linear, scaled_linear
from underpaint_server.errors import ModelNotReady
from underpaint_server.models.tensors import column
from underpaint_server.rows import Denoise, PullBack

E = TypeVar("E", bound=Enum)

_CLIPS = {"clip_sample": True}
_LINSPACE = {"timestep_spacing": "linspace"}
_KARRAS = {"beta_start": 0.00085, "beta_end": 0.012, **_LINSPACE}
CLASSES: Mapping[str, Mapping[str, object]] = {
    "DDIMScheduler": _CLIPS,
    "DDIMParallelScheduler": _CLIPS,
    "DDIMInverseScheduler": _CLIPS,
    "DDPMScheduler": _CLIPS,
    "DDPMParallelScheduler": _CLIPS,
    "PNDMScheduler": {"set_alpha_to_one": False},
    "LMSDiscreteScheduler": _LINSPACE,
    "EulerDiscreteScheduler": _LINSPACE,
    "EulerAncestralDiscreteScheduler": _LINSPACE,
    "DPMSolverMultistepScheduler": _LINSPACE,
    "DPMSolverMultistepInverseScheduler": _LINSPACE,
    "DPMSolverSinglestepScheduler": _LINSPACE,
    "DEISMultistepScheduler": _LINSPACE,
    "UniPCMultistepScheduler": _LINSPACE,
    "SASolverScheduler": _LINSPACE,
    "HeunDiscreteScheduler": _KARRAS,
    "KDPM2DiscreteScheduler": _KARRAS,
    "KDPM2AncestralDiscreteScheduler": _KARRAS,
    "DPMSolverSDEScheduler": _KARRAS,
}
"""Class of a scheduler -> where its defaults differ from those of :class:`_Config`. All have discrete timesteps and
noise levels that follow from betas; the networks of other classes expect other inputs."""

_REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "rescale_betas_zero_snr": ((False,), "alpha_bar 0 at the noisiest level cannot be inverted"),
    "use_flow_sigmas": ((False,), "its network was trained by flow matching"),
    "use_dynamic_shifting": ((False,), "its network was trained by flow matching"),
    "timestep_type": (("discrete",), "its network expects continuous noise levels"),
    "thresholding": ((False,), "dynamic thresholds of the predicted image are not supported"),
}
"""Field of a configuration -> the values that it may have, and why no other. Null is the same as absent."""
_SOLVER_ONLY = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""Fields that choose the levels of a solver that this server does not use."""


class Prediction(Enum):
    """What a network was trained to predict."""

    EPSILON = "epsilon"
    V = "v_prediction"
    SAMPLE = "sample"


@dataclass(frozen=True, slots=True)
class Reading:
    """What a scheduler's configuration says of a network."""

    schedule: Schedule
    prediction: Prediction
    clip: float | None
    """Largest absolute value of a predicted clean image; None where predictions are not clipped."""
    implied: tuple[str, ...] = ()
    """What was read without being in the file in these words: part of the checkpoint's digest, because another version
    of this server could read the same file differently."""
    remarks: tuple[str, ...] = ()
    """Sentences for people: what was read differently than the file says, and what was not used."""


class _Config(BaseModel):
    """The fields that are used, with the most common defaults of diffusers' classes."""

    model_config = ConfigDict(strict=True, frozen=True)

    num_train_timesteps: int = Field(1000, ge=2, le=1_000_000)
    beta_schedule: str = "linear"
    beta_start: float = Field(0.0001, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    trained_betas: list[float] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = Field(0, ge=0, le=1)
    set_alpha_to_one: bool = True
    clip_sample: bool = False
    clip_sample_range: float = Field(1.0, gt=0, allow_inf_nan=False)


def read(config: Mapping[str, Any], named: object = None, *, latent: bool) -> Reading:
    """Read the contents of a scheduler_config.json; raises :class:`ModelNotReady` if it is not supported.

    ``named`` is the class that model_index.json names; its defaults hold for absent fields. With ``latent``, the file
    is read as the pipelines of Stable Diffusion read it: ``steps_offset`` is 1, and predictions are not clipped.
    """
    name = _class_name(config, named)
    for key, (allowed, reason) in _REFUSED.items():
        if config.get(key) is not None and config[key] not in allowed:
            raise ModelNotReady(
                f"scheduler_config.json: {key} is {config[key]!r}, but {reason}; give a checkpoint without it"
            )
    stated = {**_Config().model_dump(), **CLASSES[name], **config}
    repairs: dict[str, object] = {"steps_offset": 1, "clip_sample": False} if latent else {}
    remarks = [
        f"scheduler_config.json: {key} is not used, because this server samples by DDIM and PLMS"
        for key in _SOLVER_ONLY
        if config.get(key)
    ] + [
        f"scheduler_config.json: {key} is {stated[key]} and read as {value}, as the pipelines of diffusers do"
        for key, value in repairs.items()
        if stated[key] != value
    ]
    fields = _parsed({**stated, **repairs})
    prediction, spacing = _chosen(Prediction, "prediction_type", fields), _chosen(Spacing, "timestep_spacing", fields)
    schedule = Schedule(_alphas_cumprod(fields), spacing, fields.steps_offset, fields.set_alpha_to_one)
    if schedule.max_steps < 1:
        raise ModelNotReady("scheduler_config.json: the schedule has too few levels; correct trained_betas")
    clip = fields.clip_sample_range if fields.clip_sample else None
    implied = [f"{key}={value}" for key, value in _implied(fields, config)]
    if clip is not None:
        implied.append(f"clip={clip}")
        remarks.append(f"predicted images are clipped to [-{clip:g}, {clip:g}] (clip_sample of its scheduler)")
    return Reading(schedule, prediction, clip, tuple(implied), tuple(remarks))


def to_epsilon(predicted: Prediction, rows: Sequence[Denoise | PullBack], latents: Tensor, out: Tensor) -> Tensor:
    """Convert a network's output to noise predictions (epsilon), float64.

    ``latents`` are those of ``rows`` and ``out`` is the network's output for them, both (b, c, h, w), float64.
    """
    if predicted is Prediction.EPSILON:
        return out
    convert = epsilon_from_v if predicted is Prediction.V else epsilon_from_x0
    return convert(latents, out, column([row.alpha_bar for row in rows], out.device))


def clipped(limit: float | None, rows: Sequence[Denoise], latents: Tensor, noise_preds: Tensor) -> Tensor:
    """The noise predictions of clean images that are clipped to [-limit, limit]; unchanged where they are inside.

    So Ho et al. (NeurIPS 2020) sample, whose posterior mean has the clipped image and the noisy one. A clipped
    prediction is still a function of latents and timestep, which is all that an exact inversion needs.
    """
    if limit is None:
        return noise_preds
    alpha_bar = column([row.alpha_bar for row in rows], noise_preds.device)
    noise = (1 - alpha_bar).sqrt()
    clean = (latents - noise * noise_preds) / alpha_bar.sqrt()
    changed = noise_preds + (alpha_bar / (1 - alpha_bar)).sqrt() * (clean - clean.clamp(-limit, limit))
    return torch.where(noise == 0, noise_preds, changed)  # without noise there is nothing to predict


def _class_name(config: Mapping[str, Any], named: object) -> str:
    names = [str(name) for name in (named, config.get("_class_name")) if name is not None]
    for name in names:
        if name not in CLASSES:
            raise ModelNotReady(
                f"the scheduler is of class {name}, which is not supported: its network may expect other noise levels "
                f"than those of discrete betas. Give a checkpoint with one of {', '.join(CLASSES)}"
            )
    if not names:
        raise ModelNotReady("scheduler_config.json names no class of a scheduler (_class_name); copy it again")
    return names[0]


def _parsed(fields: Mapping[str, object]) -> _Config:
    try:
        return _Config.model_validate({key: fields[key] for key in _Config.model_fields if key in fields})
    except ValidationError as error:
        first = error.errors()[0]
        value = repr(first["input"])[:40]
        raise ModelNotReady(
            f"scheduler_config.json: {first['loc'][0]} is {value}, which cannot be used: {first['msg']}"
        ) from error


def _chosen(kind: type[E], key: str, fields: _Config) -> E:
    value = getattr(fields, key)
    supported = [str(choice.value) for choice in kind]
    if value not in supported:
        raise ModelNotReady(_unsupported(key, value, supported))
    return kind(value)


def _implied(fields: _Config, config: Mapping[str, Any]) -> list[tuple[str, object]]:
    used = fields.model_dump(exclude={"clip_sample", "clip_sample_range"}, exclude_none=True)
    return [(key, value) for key, value in used.items() if config.get(key) != value]


def _alphas_cumprod(fields: _Config) -> tuple[float, ...]:
    alphas = tuple(_cumulated(fields))
    if not alphas or not all(1 > earlier > later > 0 for earlier, later in pairwise((*alphas, alphas[-1] / 2))):
        raise ModelNotReady(
            "scheduler_config.json: its betas must give at least one alpha_bar, and alpha_bar must decrease and stay "
            "between 1 and 0; correct num_train_timesteps, beta_start, beta_end or trained_betas"
        )
    return alphas


def _cumulated(fields: _Config) -> list[float]:
    if fields.trained_betas is not None:
        return cumulate(fields.trained_betas)
    start, end, timesteps = fields.beta_start, fields.beta_end, fields.num_train_timesteps
    match fields.beta_schedule:
        case "scaled_linear":
            return scaled_linear(start, end, timesteps)
        case "linear":
            return linear(start, end, timesteps)
        case other:
            raise ModelNotReady(_unsupported("beta_schedule", other, ["linear", "scaled_linear"]))


def _unsupported(key: str, value: object, supported: Sequence[str]) -> str:
    return f"scheduler_config.json: {key} '{value}' is not supported; give a checkpoint with {' or '.join(supported)}"
