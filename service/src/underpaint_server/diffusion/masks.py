"""From a difference of predictions to a region (Couairon et al., ICLR 2023, section 3.2)."""

import torch
from torch import Tensor

OUTLIER_RATIO = 3.0
"""Values beyond this many means of the map are extremes and are cut before rescaling."""


def normalise(difference: Tensor) -> Tensor:
    """A non-negative map (h, w) cut at its extremes and rescaled to [0, 1]; a map of zeros stays zeros.

    The mean is the map's own: nothing of another image enters.
    """
    ceiling = OUTLIER_RATIO * difference.mean()
    if ceiling == 0:
        return torch.zeros_like(difference)
    return (difference / ceiling).clamp(max=1.0)


def binarise(normalised: Tensor, threshold: float) -> Tensor:
    """1.0 where the normalised map (h, w) lies above ``threshold``, else 0.0."""
    return (normalised > threshold).double()


def to_latent_size(mask: Tensor, height: int, width: int) -> Tensor:
    """A pixel mask (H, W) in {0, 1} at latent resolution: a latent may change if any of its pixels may."""
    rows, columns = mask.shape[0] // height, mask.shape[1] // width
    return mask.reshape(height, rows, width, columns).amax((1, 3))


def to_pixel_size(mask: Tensor, height: int, width: int) -> Tensor:
    """A latent mask (h, w) at pixel resolution (H, W), each value repeated over its pixels."""
    rows, columns = height // mask.shape[0], width // mask.shape[1]
    return mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
