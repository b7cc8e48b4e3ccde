"""DiffEdit: a mask from two prompts, then an edit inside it (Couairon, Verbeek, Schwenk, Cord; ICLR 2023).

Step 1 compares the network's predictions for two texts under the same noise; step 2 encodes the image by DDIM inversion
without text; step 3 denoises with the target text and, after each step, puts the encoded latents of *that same level*
back outside the mask, so that the background ends as the encoded image itself, exactly.

The comparison needs no guidance: with a common negative prompt n, the difference of two guided predictions is
``w (eps(q) - eps(r))``, and the factor w vanishes when the map is rescaled. That halves the rows of step 1.
"""

from torch import Tensor

from underpaint_server.diffusion import masks
from underpaint_server.diffusion.ddim import add_noise, move
from underpaint_server.diffusion.sampling import guided
from underpaint_server.diffusion.tasks import Editing, Masking, Outcome
from underpaint_server.jobs import DiffEdit, Notice
from underpaint_server.rows import Denoise, Steps


def difference(task: Masking) -> Steps[Tensor]:
    """Normalised map (h, w) in [0, 1] of how much the two texts disagree about each latent (section 3.2, step 1).

    All rows are one group: they are independent and may be spread over several forward passes.
    """
    noised = [add_noise(task.source, task.noise("mask", k), task.level) for k in range(task.samples)]
    noise_preds = yield [
        Denoise(latents, task.level.timestep, task.level.alpha_bar, embeds)
        for latents in noised
        for embeds in (task.target_embeds, task.reference_embeds)
    ]
    total = sum((t - r).abs().mean(0) for t, r in zip(noise_preds[::2], noise_preds[1::2], strict=True))
    return masks.normalise(total / task.samples)


def edit(task: Editing) -> Steps[Outcome]:
    """Masked denoising along the encoded trajectory (section 3.2, steps 2 and 3)."""
    mask = task.mask
    if mask is None:
        assert task.masking is not None
        assert isinstance(task.method, DiffEdit)
        mask = masks.binarise((yield from difference(task.masking)), task.method.threshold)
    trajectory, grid = task.arrays["trajectory"], task.grid
    latents = trajectory[len(grid) - 1]
    for i in range(len(grid) - 1, 0, -1):
        noise_pred = yield from guided(latents, grid[i], task.guidance)
        latents = move(latents, noise_pred, grid[i], grid[i - 1])
        latents = mask * latents + (1 - mask) * trajectory[i - 1]
    return Outcome(latents, mask, notices(mask))


def notices(mask: Tensor) -> tuple[Notice, ...]:
    """What a caller should hear about a mask (h, w) that holds nothing or everything."""
    coverage = mask.mean()
    if coverage == 0:
        return (
            Notice(
                "MASK_EMPTY",
                "the prompts do not disagree anywhere above the threshold: nothing was changed; "
                "use prompts that differ more, a lower threshold, or give a mask",
            ),
        )
    if coverage == 1:
        return (Notice("MASK_FULL", "the mask covers the whole image: nothing is protected; raise the threshold"),)
    return ()
