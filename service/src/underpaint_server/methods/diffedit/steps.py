"""DiffEdit: a mask from two prompts, then an edit inside it (Couairon, Verbeek, Schwenk, Cord; ICLR 2023).

Step 1 compares the network's predictions for two texts under the same noise; step 2 encodes the image by DDIM inversion
without text; step 3 denoises with the target text and, after each step, puts the encoded latents of *that same level*
back outside the mask, so that the background ends as the encoded image itself, exactly.

The comparison needs no guidance: with a common negative prompt n, the difference of two guided predictions is
``w (eps(q) - eps(r))``, and the factor w vanishes when the map is rescaled. That halves the rows of step 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from underpaint_server.diffusion import masks
from underpaint_server.diffusion.ddim import add_noise, move
from underpaint_server.diffusion.sampling import guided
from underpaint_server.diffusion.schedule import Level, downwards
from underpaint_server.jobs import Notice
from underpaint_server.methods.diffedit.options import DiffEdit
from underpaint_server.methods.task import ComputedMask, Editing, Outcome
from underpaint_server.rows import Denoise, Steps


@dataclass(frozen=True, slots=True, eq=False)
class Masking:
    """The question where an edit would change an image."""

    source: Tensor
    """(c, h, w), float64: the encoded image."""
    level: Level
    """How much noise the two predictions are compared under."""
    target_embeds: Tensor
    """(tokens, width)."""
    reference_embeds: Tensor
    """(tokens, width)."""
    samples: int
    """Noise samples that the difference is averaged over."""
    noise: Callable[[str, int], Tensor]
    """(purpose, index) -> standard normal (c, h, w), float64."""


def edit(task: Editing[DiffEdit, Tensor | Masking]) -> Steps[Outcome]:
    """Masked denoising along the encoded trajectory (section 3.2, steps 2 and 3).

    The task's extra is a given mask (h, w), 1 = may change, or how to compute one.
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
    """The mask (section 3.2, step 1): 1 where the normalised difference lies above ``threshold``."""
    found = yield from difference(masking)
    mask = masks.binarise(found, threshold)
    return ComputedMask(found, mask, _notices(mask))


def difference(masking: Masking) -> Steps[Tensor]:
    """Normalised map (h, w) in [0, 1] of how much the two texts disagree about each latent.

    All rows are one group: they are independent and may be spread over several forward passes.
    """
    noised = [add_noise(masking.source, masking.noise("mask", k), masking.level) for k in range(masking.samples)]
    noise_preds = yield [
        Denoise(latents, masking.level.timestep, masking.level.alpha_bar, embeds)
        for latents in noised
        for embeds in (masking.target_embeds, masking.reference_embeds)
    ]
    total = sum((t - r).abs().mean(0) for t, r in zip(noise_preds[::2], noise_preds[1::2], strict=True))
    return masks.normalise(total / masking.samples)


def _notices(mask: Tensor) -> tuple[Notice, ...]:
    """What a caller should know about a mask (h, w) that holds nothing or everything."""
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
