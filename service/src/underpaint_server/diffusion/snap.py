"""Rounding latents, so that differences in their last bits do not change the noise prediction."""

from torch import Tensor

QUANTUM = 2.0**-12
"""Spacing of the grid, in latent units: smaller than the resolution of half precision near 1, and invisible in an
image."""
OFFSET = 0.3819660112501051
"""Shift of the grid, in quanta. It is irrational because latents of encoded images are dyadic numbers, many of which
would be exactly half-way between two points of an unshifted grid."""


def snap(latents: Tensor) -> Tensor:
    """Latents (c, h, w), float64, rounded to the nearest point of a grid.

    An exact inversion may use any function as its noise prediction, if it is the same one when inverting and when
    denoising. But the denoised latents differ from the inverted ones by about 1e-15. Where such a difference crosses a
    rounding boundary of the network's number format, the two round to different numbers and the prediction changes by
    1e-6. With float32 and the 16,384 latents of a 512 px image this happens in one round trip out of ten. Boundaries
    that are 2^-12 apart are crossed ten thousand times less often than those of float32.
    """
    return ((latents / QUANTUM + OFFSET).round() - OFFSET) * QUANTUM
