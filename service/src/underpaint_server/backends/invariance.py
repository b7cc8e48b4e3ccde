"""Whether a row's bits depend on how many rows share its pass: measured, because it cannot be assumed.

Libraries choose kernels and blockings by the size of a matrix, and another blocking adds in another order. EDICT turns
one differing bit into a visible error (see ARCHITECTURE.md), so an exact job either runs at one fixed size always, or
on a network for which this measurement finds no size that matters.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDS = 3


def is_batch_invariant(
    noise_preds: Callable[[Tensor, list[int], Tensor], Tensor],
    latent_shape: tuple[int, ...],
    embeds_shape: tuple[int, int],
    *,
    minimum: int,
    maximum: int,
) -> bool:
    """Compare random rows of one pass of ``maximum`` rows with the same rows in passes of every other kind of size.

    ``noise_preds(latents (b, c, h, w), timesteps, prompt_embeds (b, tokens, width))`` runs the network. Three rounds at
    three scales of latents; sizes from ``minimum`` up: all small ones, then every third.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [size for size in range(minimum, maximum) if size < 6 or size % 3 == 2]
    for round_ in range(ROUNDS):
        latents = torch.randn((maximum, *latent_shape), generator=generator) * (0.5, 1.0, 2.0)[round_]
        timesteps = torch.randint(0, 999, (maximum,), generator=generator).tolist()
        embeds = torch.randn((maximum, *embeds_shape), generator=generator)
        whole = noise_preds(latents, timesteps, embeds)
        for size in sizes:
            first = (round_ * 5) % (maximum - size + 1)
            part = slice(first, first + size)
            if not torch.equal(noise_preds(latents[part], timesteps[part], embeds[part]), whole[part]):
                return False
    return True
