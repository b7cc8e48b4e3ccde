"""DiffEdit's mask from the difference of two noise predictions (Couairon et al., ICLR 2023, section 3.2)."""

import torch
from torch import Tensor

OUTLIER_RATIO = 3.0
"""Values above this multiple of the map's mean are clamped to it before rescaling."""


def normalise(difference: Tensor) -> Tensor:
    """A non-negative map (h, w) with its extremes clamped, rescaled to [0, 1]; a map of zeros stays zeros.

    The mean is that of this map alone, so that other jobs of the batch do not change it.
    """
    ceiling = OUTLIER_RATIO * difference.mean()
    return torch.where(ceiling == 0, 0.0, (difference / ceiling).clamp(max=1.0))


def binarise(normalised: Tensor, threshold: float) -> Tensor:
    """1.0 where the normalised map (h, w) is above ``threshold``, else 0.0; float64."""
    return (normalised > threshold).double()


def to_latent_size(mask: Tensor, height: int, width: int) -> Tensor:
    """A pixel mask (H, W), {0, 1}, at latent resolution (h, w): 1 where any pixel of the latent is 1."""
    rows, columns = mask.shape[0] // height, mask.shape[1] // width
    return mask.reshape(height, rows, width, columns).amax((1, 3))


def to_pixel_size(mask: Tensor, height: int, width: int) -> Tensor:
    """A latent mask (h, w) at pixel resolution (H, W): each value repeated for all pixels of its latent."""
    rows, columns = height // mask.shape[0], width // mask.shape[1]
    return mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
