"""Whether a row's bits depend on how many rows share its pass: measured, because it cannot be assumed.

Libraries choose kernels and blockings by the size of a matrix, and another blocking adds in another order. EDICT turns
one differing bit into a visible error (see ARCHITECTURE.md), so an exact job either runs at one fixed size always, or
on a network for which this measurement finds no size that matters.
"""

from collections.abc import Callable
from hashlib import sha256

import torch
from torch import Tensor

ROUNDS = 3


NoisePreds = Callable[[Tensor, list[int], Tensor], Tensor]


def is_batch_invariant(
    noise_preds: NoisePreds,
    latent_shape: tuple[int, ...],
    embeds_shape: tuple[int, int],
    *,
    minimum: int,
    maximum: int,
) -> bool:
    """Compare random rows of one pass of ``maximum`` rows with the same rows in passes of other sizes.

    ``noise_preds(latents (b, c, h, w), timesteps, prompt_embeds (b, tokens, width))`` runs the network. Three rounds at
    three scales of latents; sizes from ``minimum`` up: all small ones, then every third.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [size for size in range(minimum, maximum) if size < 6 or size % 3 == 2]
    for round_ in range(ROUNDS):
        latents, timesteps, embeds = _questions(generator, maximum, latent_shape, embeds_shape)
        latents *= (0.5, 1.0, 2.0)[round_]
        whole = noise_preds(latents, timesteps, embeds)
        for size in sizes:
            first = (round_ * 5) % (maximum - size + 1)
            part = slice(first, first + size)
            if not torch.equal(noise_preds(latents[part], timesteps[part], embeds[part]), whole[part]):
                return False
    return True


def fingerprint(
    noise_preds: NoisePreds, latent_shape: tuple[int, ...], embeds_shape: tuple[int, int], *, size: int
) -> str:
    """16 hexadecimal digits over the bits of one fixed pass of ``size`` rows: which function the network is here."""
    questions = _questions(torch.Generator().manual_seed(1), size, latent_shape, embeds_shape)
    return sha256(noise_preds(*questions).cpu().numpy().tobytes()).hexdigest()[:16]


def _questions(
    generator: torch.Generator, rows: int, latent_shape: tuple[int, ...], embeds_shape: tuple[int, int]
) -> tuple[Tensor, list[int], Tensor]:
    latents = torch.randn((rows, *latent_shape), generator=generator)
    timesteps = torch.randint(0, 999, (rows,), generator=generator).tolist()
    return latents, timesteps, torch.randn((rows, *embeds_shape), generator=generator)
