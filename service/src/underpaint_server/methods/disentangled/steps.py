"""Disentangled edits: two prompts mixed with one weight per step (Wu, Zhao, Zhang, Yang, Jia, Zhang; CVPR 2023).

At step i the network gets the prompt embeddings ``lam_i c_source + (1 - lam_i) c_target`` (section 4.1). The noise, the
guidance and the sampler are those of the unedited image. Early steps decide the layout and late ones the attributes, so
weights of 1 followed by weights of 0 change an attribute and keep the layout (section 3). Learned weights, one for each
of about 50 steps, do this better, and can be used for other images too (section 4.2).

An image that was not generated needs residuals: ``r_i`` is the difference between the image noised to the next level
and the result of step i with weight 1. With the residual added after every step, weights of 1 reconstruct the image
(section 4.3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from underpaint_server.diffusion.ddim import add_noise, move
from underpaint_server.diffusion.multistep import is_heun, multistep_weights
from underpaint_server.diffusion.sampling import Guidance, guided, together
from underpaint_server.diffusion.schedule import Grid, Level, downwards
from underpaint_server.jobs import Sampler
from underpaint_server.methods.disentangled.options import DisentangledEdit
from underpaint_server.methods.task import Editing, Outcome
from underpaint_server.rows import Steps


@dataclass(frozen=True, slots=True, eq=False)
class Mixing:
    """An image to sample with two mixed prompts; all inputs besides the weights."""

    grid: Grid
    """Levels of the whole schedule."""
    source_embeds: Tensor
    """(tokens, width): used alone at a weight of 1."""
    target_embeds: Tensor
    """(tokens, width): used alone at a weight of 0."""
    negative_embeds: Tensor
    """(tokens, width): of the negative prompt."""
    guidance_scale: float
    sampler: Sampler
    start: Tensor
    """(c, h, w), float64: the latents at the noisiest level."""
    residuals: Tensor | None
    """(n, c, h, w), float64: added after each step, noisiest first. None for a generated image."""
    probe_residual: Tensor | None = None
    """(c, h, w), float64: added to the probe of Heun's step. None for a generated image."""


def edit(task: Editing[DisentangledEdit, Mixing]) -> Steps[Outcome]:
    """Sample the image with the weights of the options."""
    drawing = yield from sample(task.extra, task.options.weights)
    return Outcome(drawing.latents)


def reference(mixing: Mixing) -> Steps[Tensor]:
    """Latents (c, h, w) of the unedited image: all weights are 1."""
    drawing = yield from sample(mixing, [1.0] * (len(mixing.grid) - 1))
    return drawing.latents


def anchor(mixing: Mixing, source: Tensor, noise: Callable[[str, int], Tensor]) -> Steps[Mixing]:
    """The same mixing with the start and the residuals of an encoded image (section 4.3 and the authors' code).

    Weights of 1 reconstruct ``source`` (c, h, w). It is noised to each level with other noise; ``noise`` returns it
    for a purpose and an index. These latents are known beforehand, so all their predictions are computed in one group.
    Heun's probe, which a plain step computes, has the residual of that step: with weights of 1 it is the next latents.
    The rows do not depend on the target prompt.
    """
    given, mixing = mixing, replace(mixing, target_embeds=mixing.source_embeds)
    steps = downwards(mixing.grid)
    states = [add_noise(source, noise("anchor", i), step.noisy) for i, step in enumerate(steps)]
    ends = [*states[1:], source]
    predictions = [_predict(mixing, x, step.noisy, 1.0) for x, step in zip(states, steps, strict=True)]
    drawing = Drawing(states, list((yield from together(*predictions))))
    probe = move(states[0], drawing.noise_preds[0], steps[0].noisy, steps[0].clean)
    anchored = replace(mixing, start=states[0], probe_residual=ends[0] - probe)
    residuals = []
    for i, (_, noisy, clean) in enumerate(steps):
        mean = yield from _mean(anchored, drawing, i, 1.0)
        residuals.append(ends[i] - move(states[i], mean, noisy, clean))
    return replace(anchored, target_embeds=given.target_embeds, residuals=torch.stack(residuals))


@dataclass(slots=True, eq=False)
class Drawing:
    """The record of sampling one image: what its gradient needs."""

    states: list[Tensor]
    """Latents x_0 .. x_n (c, h, w), float64, noisiest first."""
    noise_preds: list[Tensor] = field(default_factory=list)
    """Guided noise predictions (c, h, w) for x_0 .. x_(n-1)."""
    probe: Tensor | None = None
    """Latents (c, h, w) at the end of Heun's step; None with another sampler than PLMS."""

    @property
    def latents(self) -> Tensor:
        """Latents (c, h, w) of the finished image."""
        return self.states[-1]


def sample(mixing: Mixing, weights: Sequence[float]) -> Steps[Drawing]:
    """Sample the image with ``weights``, one per step, noisiest first."""
    drawing = Drawing([mixing.start])
    for i, (_, noisy, clean) in enumerate(downwards(mixing.grid)):
        drawing.noise_preds.append((yield from _predict(mixing, drawing.states[i], noisy, weights[i])))
        mean = yield from _mean(mixing, drawing, i, weights[i])
        latents = move(drawing.states[i], mean, noisy, clean)
        drawing.states.append(latents if mixing.residuals is None else latents + mixing.residuals[i])
    return drawing


def _predict(mixing: Mixing, latents: Tensor, level: Level, weight: float) -> Steps[Tensor]:
    guidance = Guidance(mixed_embeds(mixing, weight), mixing.negative_embeds, mixing.guidance_scale)
    return (yield from guided(latents, level, guidance))


def mixed_embeds(mixing: Mixing, weight: float) -> Tensor:
    """Prompt embeddings (tokens, width) of a step with this weight."""
    return weight * mixing.source_embeds + (1 - weight) * mixing.target_embeds


def _mean(mixing: Mixing, drawing: Drawing, i: int, weight: float) -> Steps[Tensor]:
    """The weighted mean of noise predictions that step ``i`` uses."""
    noise_pred = drawing.noise_preds[i]
    if is_heun(mixing.sampler, i):
        _, noisy, clean = downwards(mixing.grid)[0]
        probe = move(drawing.states[0], noise_pred, noisy, clean)
        drawing.probe = probe if mixing.probe_residual is None else probe + mixing.probe_residual
        ahead = yield from _predict(mixing, drawing.probe, clean, weight)
        return (noise_pred + ahead) / 2
    shares = multistep_weights(mixing.sampler, i)
    if len(shares) == 1:
        return noise_pred
    return torch.stack([share * drawing.noise_preds[i - j] for j, share in enumerate(shares)]).sum(0)
