"""Disentangled edits: two prompts mixed with one weight a step (Wu, Zhao, Zhang, Yang, Jia, Zhang; CVPR 2023).

The network gets ``c_i = lam_i c_source + (1 - lam_i) c_target`` at step i (section 4.1), everything else stays: the
noise, the guidance, the sampler. Early steps decide the layout and late ones the attributes, so weights of 1 before 0
change an attribute and keep the layout (section 3); about 50 learned weights do it better (section 4.2), and on other
images too.

A real image needs residuals: ``r_i`` is what the step at weight 1 misses between two noised versions of the image. With
the residuals added after every step, a weight of 1 everywhere leads back to the image (section 4.3).
"""

from collections.abc import Sequence
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
    """An image and two texts to draw it with, mixed by one weight a step."""

    grid: Grid
    """Levels of the whole schedule."""
    source_embeds: Tensor
    """(tokens, width): at a weight of 1."""
    target_embeds: Tensor
    """(tokens, width): at a weight of 0."""
    negative_embeds: Tensor
    """(tokens, width): what guidance points away from."""
    guidance_scale: float
    sampler: Sampler
    start: Tensor
    """(c, h, w), float64, at the noisiest level."""
    residuals: Tensor | None
    """(n, c, h, w), float64, added after each step, noisiest first: what makes a weight of 1 lead back to a real
    image. None where the model draws the image itself."""


def edit(task: Editing[DisentangledEdit, Mixing]) -> Steps[Outcome]:
    """Draw the image with the method's weights."""
    drawing = yield from sample(task.extra, task.options.weights)
    return Outcome(drawing.latents)


def reference(mixing: Mixing) -> Steps[Tensor]:
    """Latents (c, h, w) of the unedited image: all weights 1."""
    drawing = yield from sample(mixing, [1.0] * (len(mixing.grid) - 1))
    return drawing.latents


def anchor(mixing: Mixing, source: Tensor, noise: Sequence[Tensor]) -> Steps[Mixing]:
    """The same mixing with the start and the residuals of a real image (section 4.3 and the authors' code).

    ``source`` (c, h, w) is noised to every level with noise of its own. These states are known beforehand, so all
    their predictions are asked for in one group.
    """
    steps = downwards(mixing.grid)
    states = [add_noise(source, each, step.noisy) for each, step in zip(noise, steps, strict=True)]
    ends = [*states[1:], source]
    predictions = [_predict(mixing, x, step.noisy, 1.0) for x, step in zip(states, steps, strict=True)]
    drawing = Drawing(states, list((yield from together(*predictions))))
    residuals = []
    for i, (_, noisy, clean) in enumerate(steps):
        mean = yield from _mean(mixing, drawing, i, 1.0)
        residuals.append(ends[i] - move(states[i], mean, noisy, clean))
    return replace(mixing, start=states[0], residuals=torch.stack(residuals))


@dataclass(slots=True, eq=False)
class Drawing:
    """One drawing of an image: all that its derivative needs."""

    states: list[Tensor]
    """x_0 .. x_n (c, h, w), noisiest first."""
    noise_preds: list[Tensor] = field(default_factory=list)
    """Guided, at x_0 .. x_(n-1)."""
    probe: Tensor | None = None
    """Latents at the far end of Heun's step."""

    @property
    def latents(self) -> Tensor:
        """The finished image's, (c, h, w)."""
        return self.states[-1]


def sample(mixing: Mixing, weights: Sequence[float]) -> Steps[Drawing]:
    """Draw the image under ``weights``, one a step, noisiest first."""
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
    """(tokens, width): the text of a step."""
    return weight * mixing.source_embeds + (1 - weight) * mixing.target_embeds


def _mean(mixing: Mixing, drawing: Drawing, i: int, weight: float) -> Steps[Tensor]:
    """The prediction that step ``i`` moves along."""
    now = drawing.noise_preds[i]
    if is_heun(mixing.sampler, i):
        _, noisy, clean = downwards(mixing.grid)[0]
        drawing.probe = move(drawing.states[0], now, noisy, clean)
        ahead = yield from _predict(mixing, drawing.probe, clean, weight)
        return (now + ahead) / 2
    shares = multistep_weights(mixing.sampler, i)
    if len(shares) == 1:
        return now
    return torch.stack([share * drawing.noise_preds[i - j] for j, share in enumerate(shares)]).sum(0)
