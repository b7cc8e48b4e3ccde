"""A checkpoint's scheduler configuration as a :class:`Schedule`; the class of the scheduler is ignored."""

from collections.abc import Mapping, Sequence
from enum import Enum
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from underpaint_server.diffusion.ddim import epsilon_from_v, epsilon_from_x0
from underpaint_server.diffusion.schedule import Schedule, Spacing, cumulate, linear, scaled_linear
from underpaint_server.errors import ModelNotReady
from underpaint_server.rows import Denoise, PullBack


class Prediction(Enum):
    """What a network was trained to predict."""

    EPSILON = "epsilon"
    V = "v_prediction"
    SAMPLE = "sample"


def schedule(config: Mapping[str, Any]) -> Schedule:
    """The noise schedule of a scheduler_config.json; raises :class:`ModelNotReady` if it is not supported."""
    if config.get("rescale_betas_zero_snr"):
        raise ModelNotReady(
            "scheduler_config.json: rescale_betas_zero_snr is not supported, because alpha_bar 0 at the noisiest level "
            "cannot be inverted; give a checkpoint without it"
        )
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in {s.value for s in Spacing}:
        raise ModelNotReady(_unsupported("timestep_spacing", spacing, [s.value for s in Spacing]))
    alphas = tuple(_alphas_cumprod(config))
    if not alphas or not all(1 > earlier > later > 0 for earlier, later in pairwise((*alphas, alphas[-1] / 2))):
        raise ModelNotReady(
            "scheduler_config.json: its betas must give at least one alpha_bar, and alpha_bar must decrease and stay "
            "between 1 and 0; correct num_train_timesteps, beta_start, beta_end or trained_betas"
        )
    return Schedule(
        alphas_cumprod=alphas,
        spacing=Spacing(spacing),
        steps_offset=int(config.get("steps_offset", 0)),
        set_alpha_to_one=bool(config.get("set_alpha_to_one", True)),
    )


def prediction(config: Mapping[str, Any]) -> Prediction:
    """What the network predicts, by a scheduler_config.json; raises :class:`ModelNotReady` if it is not supported."""
    name = config.get("prediction_type", "epsilon")
    if name not in {p.value for p in Prediction}:
        raise ModelNotReady(_unsupported("prediction_type", name, [p.value for p in Prediction]))
    return Prediction(name)


def to_epsilon(predicted: Prediction, rows: Sequence[Denoise | PullBack], latents: Tensor, out: Tensor) -> Tensor:
    """Convert a network's output to noise predictions (epsilon), float64.

    ``latents`` are those of ``rows`` and ``out`` is the network's output for them, both (b, c, h, w), float64.
    """
    if predicted is Prediction.EPSILON:
        return out
    convert = epsilon_from_v if predicted is Prediction.V else epsilon_from_x0
    parts = zip(rows, latents, out, strict=True)
    return torch.stack([convert(x, pred, row.alpha_bar) for row, x, pred in parts])


def _alphas_cumprod(config: Mapping[str, Any]) -> list[float]:
    if config.get("trained_betas") is not None:
        return cumulate(config["trained_betas"])
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    timesteps = config.get("num_train_timesteps", 1000)
    match config.get("beta_schedule", "linear"):
        case "scaled_linear":
            return scaled_linear(start, end, timesteps)
        case "linear":
            return linear(start, end, timesteps)
        case other:
            raise ModelNotReady(_unsupported("beta_schedule", other, ["linear", "scaled_linear"]))


def _unsupported(key: str, value: object, supported: Sequence[str]) -> str:
    return f"scheduler_config.json: {key} '{value}' is not supported; give a checkpoint with {' or '.join(supported)}"
