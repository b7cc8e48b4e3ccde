"""A checkpoint's scheduler configuration as a :class:`Schedule`: only its numbers count, not its class."""

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
    """The training levels and the grid's spacing; raises :class:`ModelNotReady` for what is not understood."""
    if config.get("rescale_betas_zero_snr"):
        raise ModelNotReady("scheduler: rescale_betas_zero_snr is not supported: its noisiest level cannot be inverted")
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in {s.value for s in Spacing}:
        raise ModelNotReady(f"scheduler: timestep_spacing '{spacing}' is none of {[s.value for s in Spacing]}")
    alphas = tuple(_alphas_cumprod(config))
    if not alphas or not all(1 > earlier > later > 0 for earlier, later in pairwise((*alphas, alphas[-1] / 2))):
        raise ModelNotReady(
            "scheduler: its betas lead to no levels, or to none that fall from 1 to 0; look at num_train_timesteps, "
            "beta_start, beta_end and trained_betas"
        )
    return Schedule(
        alphas_cumprod=alphas,
        spacing=Spacing(spacing),
        steps_offset=int(config.get("steps_offset", 0)),
        set_alpha_to_one=bool(config.get("set_alpha_to_one", True)),
    )


def prediction(config: Mapping[str, Any]) -> Prediction:
    """What the network predicts; raises :class:`ModelNotReady` for what is not understood."""
    named = config.get("prediction_type", "epsilon")
    if named not in {p.value for p in Prediction}:
        raise ModelNotReady(f"scheduler: prediction_type '{named}' is none of {[p.value for p in Prediction]}")
    return Prediction(named)


def to_epsilon(predicted: Prediction, rows: Sequence[Denoise | PullBack], latents: Tensor, out: Tensor) -> Tensor:
    """What a network answered to ``rows`` with these latents (b, c, h, w), float64, as noise predictions."""
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
            raise ModelNotReady(f"scheduler: beta_schedule '{other}' is neither 'linear' nor 'scaled_linear'")
