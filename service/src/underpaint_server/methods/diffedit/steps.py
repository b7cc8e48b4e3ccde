"""DiffEdit: compute a mask from two prompts, edit inside it (Couairon, Verbeek, Schwenk, Cord; ICLR 2023).

Step 1 compares the noise predictions for two prompts with the same noise. Step 2 inverts the image by DDIM without a
prompt. Step 3 denoises with the target prompt and, after each step, replaces the latents outside the mask by those of
the inversion *at the same level*, so that the result outside the mask is exactly the encoded image.

The comparison needs no guidance: with the same negative prompt, the difference of two guided predictions is
``w (eps(target) - eps(reference))``, and rescaling the map removes the factor w. That halves the rows of step 1.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from underpaint_server.diffusion import masks
from underpaint_server.diffusion.ddim import add_noise, move
from underpaint_server.diffusion.sampling import guided, together
from underpaint_server.diffusion.schedule import Level, downwards
from underpaint_server.jobs import Notice
from underpaint_server.methods.diffedit.options import DiffEdit
from underpaint_server.methods.task import ComputedMask, Editing, Outcome
from underpaint_server.rows import Denoise, Steps, named


@dataclass(frozen=True, slots=True, eq=False)
class Masking:
    """The task of computing a mask."""

    source: Tensor
    """(c, h, w), float64: the encoded image."""
    level: Level
    """Noise level at which the two predictions are compared."""
    target_embeds: Tensor
    """(tokens, width): of the target prompt."""
    reference_embeds: Tensor
    """(tokens, width): of the reference prompt."""
    names: tuple[Hashable, Hashable]
    """Names of the predictions for the two prompts, see :func:`underpaint_server.rows.named`."""
    samples: int
    """Number of noise samples that the difference is averaged over."""
    noise: Callable[[str, int], Tensor]
    """(purpose, index) -> standard normal (c, h, w), float64."""


def edit(task: Editing[DiffEdit, Tensor | Masking]) -> Steps[Outcome]:
    """Masked denoising along the trajectory of the inversion (section 3.2, steps 2 and 3).

    The task's extra is the mask of the request (h, w), 1 = may be edited, or the task of computing one.
    """
    if isinstance(task.extra, Masking):
        computed = yield from compute_mask(task.extra, task.options.threshold)
        mask, notices = computed.mask, computed.notices
    else:
        mask, notices = task.extra, _notices(task.extra)
    trajectory = task.arrays["trajectory"]
    latents = trajectory[len(task.grid) - 1]
    for k, noisy, clean in downwards(task.grid):
        noise_pred = yield from guided(latents, noisy, task.guidance)
        latents = move(latents, noise_pred, noisy, clean)
        latents = mask * latents + (1 - mask) * trajectory[k - 1]
    return Outcome(latents, mask, notices)


def compute_mask(masking: Masking, threshold: float) -> Steps[ComputedMask]:
    """The mask (section 3.2, step 1): 1 where the normalised difference is above ``threshold``."""
    normalised = yield from difference(masking)
    mask = masks.binarise(normalised, threshold)
    return ComputedMask(normalised, mask, _notices(mask))


def difference(masking: Masking) -> Steps[Tensor]:
    """Normalised difference (h, w), [0, 1], of the noise predictions for the two prompts.

    All rows are one group, because they are independent; the engine may split them into several forward passes.
    """
    noised = [add_noise(masking.source, masking.noise("mask", k), masking.level) for k in range(masking.samples)]
    prompts = zip(masking.names, (masking.target_embeds, masking.reference_embeds), strict=True)
    target, reference = yield from together(
        *(named(name, _predictions(noised, masking.level, embeds)) for name, embeds in prompts)
    )
    differences = [(t - r).abs().mean(0) for t, r in zip(target, reference, strict=True)]
    return masks.normalise(sum(differences, start=torch.zeros_like(differences[0])) / masking.samples)


def _predictions(noised: Sequence[Tensor], level: Level, prompt_embeds: Tensor) -> Steps[Sequence[Tensor]]:
    return (yield [Denoise(latents, level.timestep, level.alpha_bar, prompt_embeds) for latents in noised])


def _notices(mask: Tensor) -> tuple[Notice, ...]:
    """A notice for a mask (h, w) that is empty or covers the whole image."""
    coverage = mask.mean()
    if coverage == 0:
        return (
            Notice(
                "MASK_EMPTY",
                "the difference of the two prompts is nowhere above the threshold, so nothing was changed; use prompts "
                "that differ more, a lower threshold, or give a mask",
            ),
        )
    if coverage == 1:
        return (Notice("MASK_FULL", "the mask covers the whole image, so nothing is kept; raise the threshold"),)
    return ()
