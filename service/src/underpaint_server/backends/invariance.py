"""Measure whether the bits of a row's result depend on the size of its pass.

Libraries choose kernels and block sizes by the size of a matrix, and another block size adds in another order. EDICT
amplifies one differing bit to a visible error, and other methods to several levels of a pixel (see ARCHITECTURE.md).
So all passes have one fixed size, unless this measurement finds no difference between sizes.
"""

from collections.abc import Callable
from hashlib import sha256

import torch
from torch import Tensor

ROUNDS = 3
"""Rounds of the comparison, with random latents of another scale in each."""

NoisePreds = Callable[[Tensor, list[int], Tensor], Tensor]
"""Function from latents (b, c, h, w), b timesteps and prompt_embeds (b, tokens, width) to noise predictions."""


def is_batch_invariant(
    noise_preds: NoisePreds,
    latent_shape: tuple[int, ...],
    embeds_shape: tuple[int, int],
    *,
    minimum: int,
    maximum: int,
) -> bool:
    """Whether rows of a pass of ``maximum`` rows have the same bits in smaller passes.

    ``noise_preds`` runs the network on random inputs; ``latent_shape`` is (c, h, w), ``embeds_shape`` (tokens, width).
    The sizes compared are those from ``minimum`` up to 5, then every third.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [size for size in range(minimum, maximum) if size < 6 or size % 3 == 2]
    for number in range(ROUNDS):
        latents, timesteps, embeds = _random_inputs(generator, maximum, latent_shape, embeds_shape)
        latents *= (0.5, 1.0, 2.0)[number]
        expected = noise_preds(latents, timesteps, embeds)
        for size in sizes:
            first = (number * 5) % (maximum - size + 1)
            part = slice(first, first + size)
            if not torch.equal(noise_preds(latents[part], timesteps[part], embeds[part]), expected[part]):
                return False
    return True


def fingerprint(
    noise_preds: NoisePreds, latent_shape: tuple[int, ...], embeds_shape: tuple[int, int], *, size: int
) -> str:
    """16 hexadecimal digits of the sha256 of the noise predictions of one fixed pass of ``size`` random rows.

    Equal fingerprints mean that the network gives the same bits, which exact inversions need.
    """
    inputs = _random_inputs(torch.Generator().manual_seed(1), size, latent_shape, embeds_shape)
    return sha256(noise_preds(*inputs).cpu().numpy().tobytes()).hexdigest()[:16]


def _random_inputs(
    generator: torch.Generator, rows: int, latent_shape: tuple[int, ...], embeds_shape: tuple[int, int]
) -> tuple[Tensor, list[int], Tensor]:
    latents = torch.randn((rows, *latent_shape), generator=generator)
    timesteps = torch.randint(0, 999, (rows,), generator=generator).tolist()
    return latents, timesteps, torch.randn((rows, *embeds_shape), generator=generator)
