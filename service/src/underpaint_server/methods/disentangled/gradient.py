"""The gradient of a loss with respect to the weights of a disentangled edit (Wu et al., CVPR 2023, section 4.2).

The latents of every step are stored, and the adjoint goes back over them step by step. The gradient is exact and needs
the memory of one step, because no autograd graph is kept over several steps.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from underpaint_server.diffusion.ddim import coefficients
from underpaint_server.diffusion.multistep import is_heun, multistep_weights
from underpaint_server.diffusion.schedule import Level, downwards
from underpaint_server.methods.disentangled.steps import Drawing, Mixing, mixed_embeds
from underpaint_server.rows import PullBack, Steps


def backward(mixing: Mixing, drawing: Drawing, weights: Sequence[float], by_latents: Tensor) -> Steps[Tensor]:
    """Gradient (n,), float64, of a loss with respect to the weights, from ``by_latents``, that with respect to the
    final latents (c, h, w). It is on their device.

    A step is ``x_(i+1) = a_i x_i + b_i sum_j w_ij e_(i-j) + r_i``, e the noise predictions and r the residuals. Let g
    be the gradient with respect to x_(i+1), computed from the last step to the first. Then e_(i-j) gets
    ``w_ij b_i g``, and the gradient with respect to x_i is ``a_i g`` plus the network's vector-Jacobian product of the
    sum that e_i got.
    """
    by_x, by_pred = by_latents, [torch.zeros_like(by_latents) for _ in weights]
    by_weights = [by_latents.new_zeros(()) for _ in weights]
    for i, (_, noisy, clean) in reversed(list(enumerate(downwards(mixing.grid)))):
        a, b = coefficients(noisy, clean)
        if is_heun(mixing.sampler, i):  # the first step: the gradient with respect to its start is not needed
            assert drawing.probe is not None
            ahead, by_weights[i] = yield from _pull(mixing, drawing.probe, clean, weights[i], by_x * (b / 2))
            by_pred[i] = by_pred[i] + by_x * (b / 2) + ahead * b
        else:
            for j, share in enumerate(multistep_weights(mixing.sampler, i)):
                by_pred[i - j] = by_pred[i - j] + share * b * by_x
        pulled, by_weight = yield from _pull(mixing, drawing.states[i], noisy, weights[i], by_pred[i])
        by_weights[i] += by_weight
        by_x = a * by_x + pulled
    return torch.stack(by_weights)


def _pull(
    mixing: Mixing, latents: Tensor, level: Level, weight: float, cotangent: Tensor
) -> Steps[tuple[Tensor, Tensor]]:
    """Gradients with respect to the latents (c, h, w) and the weight, from that with respect to the guided
    prediction."""
    w = mixing.guidance_scale
    towards = PullBack(latents, level.timestep, level.alpha_bar, mixed_embeds(mixing, weight), w * cotangent)
    rows = [towards]
    if w != 1.0:
        rows.append(replace(towards, prompt_embeds=mixing.negative_embeds, cotangent=(1 - w) * cotangent))
    answers = yield rows
    slope = (mixing.source_embeds - mixing.target_embeds).double()
    by_weight = (answers[0].prompt_embeds * slope).sum()
    return torch.stack([answer.latents for answer in answers]).sum(0), by_weight
