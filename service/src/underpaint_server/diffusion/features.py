"""Mixing activations of a network's inner layers (Jeong, Kwon, Uh; WACV 2024; the "h-space" of Kwon et al., ICLR 2023).

Activations are (c, h, w). They come in float32 and leave in it; in between everything is float64.
"""

from math import acos, sin, sqrt

import torch
from torch import Tensor
from torch.nn import functional

from underpaint_server.diffusion.ddim import pred_x0
from underpaint_server.diffusion.schedule import Level
from underpaint_server.jobs import Interpolation

PARALLEL = 0.9995
"""Cosine beyond which the great circle between two activations is their chord, and its formula 0 / 0."""
_HALF_MAX = torch.finfo(torch.float16).max


def inject(
    own: Tensor, content: Tensor, weight: float, interpolation: Interpolation, region: Tensor | None = None
) -> Tensor:
    """``own`` with a share ``weight``, [0, 1], of another picture's activation at the same site.

    ``region`` (h, w), [0, 1], limits it: what lies inside is cut out of both, mixed, and put back. So the
    content is brought to the norm that ``own`` has *there*, and nothing outside the region can tell how much changes.
    Weight 0 gives back ``own`` itself, to the bit.
    """
    if weight == 0:
        return own
    mine, theirs = own.double(), content.double()
    if region is None:
        return _mix(mine, theirs, weight, interpolation).to(own.dtype)
    inside = _mix(region * mine, region * theirs, weight, interpolation)
    return (inside + (1 - region) * mine).to(own.dtype)


def to_feature_size(region: Tensor, height: int, width: int) -> Tensor:
    """A region (H, W), {0, 1}, at an activation's resolution: the share of each of its cells that lies inside."""
    return functional.adaptive_avg_pool2d(region[None], (height, width))[0]


def calibrate(latents: Tensor, noise_pred: Tensor, mapped_pred: Tensor, level: Level, weight: float) -> Tensor:
    """Latents whose own, unmapped prediction is near the mapped one: skip-connection calibration.

    ``mapped_pred`` is the noise prediction with changed features. The clean picture it stands for is brought to the
    spread of the plain one; the latents move by that difference, and by ``weight`` (omega) of the difference in noise.
    """
    plain, mapped = (pred_x0(latents, pred, level.alpha_bar) for pred in (noise_pred, mapped_pred))
    mapped = _with_spread_of(mapped, plain)
    shift = sqrt(level.alpha_bar) * (mapped - plain)
    return latents + shift + weight * sqrt(1 - level.alpha_bar) * (mapped_pred - noise_pred)


def to_half(activations: Tensor) -> Tensor:
    """Activations as they are stored: float16, half the bytes. They are used for their direction, in which 11 bits are
    finer than a bfloat16 network's own; one that is too large for the format becomes its largest number."""
    return activations.clamp(-_HALF_MAX, _HALF_MAX).half()


def _mix(own: Tensor, content: Tensor, weight: float, interpolation: Interpolation) -> Tensor:
    norm, theirs = float(own.norm()), float(content.norm())
    if norm == 0 or theirs == 0:  # nothing to scale to, or nothing to scale: the norm stays
        return own
    scaled = content * (norm / theirs)
    cosine = max(-1.0, min(1.0, float((own * scaled).sum()) / norm**2))
    if interpolation is Interpolation.LERP or abs(cosine) > PARALLEL:
        return own + weight * (scaled - own)
    angle = acos(cosine)
    return (sin((1 - weight) * angle) * own + sin(weight * angle) * scaled) / sin(angle)


def _with_spread_of(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor`` scaled about its mean to the standard deviation of ``other``; a constant one stays as it is."""
    spread, mean = tensor.std(), tensor.mean()
    if spread == 0:
        return tensor
    return mean + (tensor - mean) * (other.std() / spread)
