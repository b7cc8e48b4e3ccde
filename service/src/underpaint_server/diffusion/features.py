"""Mixing activations of a network's inner layers (Jeong, Kwon, Uh; WACV 2024; the "h-space" of Kwon et al., ICLR 2023).

Activations are (c, h, w), float32; they are mixed in float64.
"""

from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional

from underpaint_server.diffusion.ddim import pred_x0
from underpaint_server.diffusion.schedule import Level
from underpaint_server.jobs import Interpolation

PARALLEL = 0.9995
"""Absolute cosine similarity above which slerp is computed as lerp: its formula tends to 0 / 0 there."""
_HALF_MAX = torch.finfo(torch.float16).max


def inject(
    own: Tensor, content: Tensor, weight: float, interpolation: Interpolation, region: Tensor | None = None
) -> Tensor:
    """``own`` mixed with a share ``weight``, [0, 1], of ``content``, another image's activation at the same site.

    ``content`` is scaled to the norm of ``own`` first. With a ``region`` (h, w), [0, 1], only the activations inside it
    are mixed: the norms are those inside the region, and outside it ``own`` is unchanged. Weight 0 returns ``own``
    bitwise.
    """
    if weight == 0:
        return own
    own64, content64 = own.double(), content.double()
    if region is None:
        return _mix(own64, content64, weight, interpolation).to(own.dtype)
    inside = _mix(region * own64, region * content64, weight, interpolation)
    return (inside + (1 - region) * own64).to(own.dtype)


def to_feature_size(region: Tensor, height: int, width: int) -> Tensor:
    """A region (H, W), {0, 1}, at the resolution of an activation: for each cell (h, w) the share inside the region."""
    return functional.adaptive_avg_pool2d(region[None], (height, width))[0]


def calibrate(latents: Tensor, noise_pred: Tensor, mapped_pred: Tensor, level: Level, weight: float) -> Tensor:
    """Calibrated latents, whose prediction without changed features is near the one with them (Jeong et al., WACV
    2024).

    ``mapped_pred`` is the noise prediction with changed features, ``noise_pred`` the one without. The x0 of
    ``mapped_pred`` is scaled to the standard deviation of the x0 of ``noise_pred``; the latents change by the
    difference of the two x0, and by a share ``weight`` (omega, [0, 1]) of the difference of the noise.
    """
    plain, mapped = (pred_x0(latents, pred, level.alpha_bar) for pred in (noise_pred, mapped_pred))
    mapped = _with_spread_of(mapped, plain)
    shift = sqrt(level.alpha_bar) * (mapped - plain)
    return latents + shift + weight * sqrt(1 - level.alpha_bar) * (mapped_pred - noise_pred)


def to_half(activations: Tensor) -> Tensor:
    """Activations as they are stored: float16, values beyond its range clamped to it.

    Half the bytes of float32 are enough: an injection uses their direction, and float16 has more significant bits than
    the activations of a bfloat16 network.
    """
    return activations.clamp(-_HALF_MAX, _HALF_MAX).half()


def _mix(own: Tensor, content: Tensor, weight: float, interpolation: Interpolation) -> Tensor:
    """No number is read from the device: where a formula does not hold, its result is computed and not taken."""
    norm, content_norm = own.norm(), content.norm()
    scaled = content * (norm / content_norm)
    mixed = own + weight * (scaled - own)
    if interpolation is Interpolation.SLERP:
        cosine = ((own * scaled).sum() / norm**2).clamp(-1, 1)
        angle = cosine.acos()
        slerp = (((1 - weight) * angle).sin() * own + (weight * angle).sin() * scaled) / angle.sin()
        mixed = torch.where(cosine.abs() > PARALLEL, mixed, slerp)
    return torch.where((norm == 0) | (content_norm == 0), own, mixed)  # content cannot be scaled to the norm of own


def _with_spread_of(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor`` scaled about its mean to the standard deviation of ``other``; a constant tensor is returned
    unchanged."""
    spread, mean = tensor.std(), tensor.mean()
    return torch.where(spread == 0, tensor, mean + (tensor - mean) * (other.std() / spread))
