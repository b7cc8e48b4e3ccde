"""Learning the weights of a disentangled edit (Wu et al., CVPR 2023, section 4): by gradients, or by comparing step
functions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from underpaint_server.diffusion.sampling import together
from underpaint_server.jobs import Descent, LearnOptions, LearnState, Search
from underpaint_server.methods.disentangled.gradient import backward
from underpaint_server.methods.disentangled.options import step_weights
from underpaint_server.methods.disentangled.steps import Mixing, sample
from underpaint_server.rows import Decode, PullBackDecode, Score, Scored, Steps


@dataclass(frozen=True, slots=True, eq=False)
class Learning:
    """The task of learning weights."""

    examples: Sequence[Mixing]
    """Images to learn on; all with the same number of steps."""
    references: Sequence[Tensor]
    """(c, h, w), float64: for each example the latents of the unedited image."""
    options: LearnOptions
    state: LearnState | None
    """State to continue from; None at the start."""
    iterations: int
    """Largest number of optimiser steps to do."""


def learn(task: Learning) -> Steps[LearnState]:
    """Minimise the loss, averaged over the examples. Returns the state after at most ``iterations`` optimiser steps."""
    images = yield [Decode(latents) for latents in task.references]
    if isinstance(task.options.method, Descent):
        return (yield from _descend(task, images, task.options.method))
    return (yield from _search(task, images, task.options.method))


def _descend(task: Learning, references: Sequence[Tensor], method: Descent) -> Steps[LearnState]:
    """Adam on the weights. The loss is computed before each optimiser step and once after the last, so that
    ``best_weights`` have the smallest of all computed losses."""
    state = task.state or _initial_state(task)
    last = min(method.optimization_steps, state.iteration + task.iterations)
    while state.iteration < last:
        loss, gradient = yield from _measure(task, references, state.weights, gradient=True)
        assert gradient is not None
        state = _stepped(_measured(state, loss), gradient, method)
    if state.iteration == method.optimization_steps:
        loss, _ = yield from _measure(task, references, state.weights, gradient=False)
        state = _measured(state, loss)
    return state


def _search(task: Learning, references: Sequence[Tensor], method: Search) -> Steps[LearnState]:
    """Compute the loss of every candidate step function (section 3) and keep the best."""
    candidates = [
        step_weights(task.options.num_inference_steps, switch, late)
        for switch in method.switch_steps
        for late in method.late_weights
    ]
    measures = yield from together(*(_measure(task, references, weights, gradient=False) for weights in candidates))
    state = _initial_state(task)
    for weights, (loss, _) in zip(candidates, measures, strict=True):
        state = _measured(replace(state, weights=weights), loss)
    return replace(state, iteration=1, weights=state.best_weights)


def _initial_state(task: Learning) -> LearnState:
    options = task.options
    weights = step_weights(options.num_inference_steps, options.switch_step, options.late_weight)
    zeros = (0.0,) * len(weights)
    return LearnState(0, weights, zeros, zeros, (), weights)


def _measured(state: LearnState, loss: float) -> LearnState:
    is_best = not state.losses or loss < min(state.losses)
    best = state.weights if is_best else state.best_weights
    return replace(state, losses=(*state.losses, loss), best_weights=best)


def _stepped(state: LearnState, gradient: Tensor, method: Descent) -> LearnState:
    weights = torch.tensor(state.weights, dtype=torch.float64)
    weights.grad = gradient.cpu()
    adam = torch.optim.Adam([weights], lr=method.learning_rate)
    adam.state[weights] = {
        "step": torch.tensor(float(state.iteration)),
        "exp_avg": torch.tensor(state.first_moment, dtype=torch.float64),
        "exp_avg_sq": torch.tensor(state.second_moment, dtype=torch.float64),
    }
    adam.step()
    moments = adam.state[weights]
    return replace(
        state,
        iteration=state.iteration + 1,
        weights=tuple(weights.tolist()),
        first_moment=tuple(moments["exp_avg"].tolist()),
        second_moment=tuple(moments["exp_avg_sq"].tolist()),
    )


def _measure(
    task: Learning, references: Sequence[Tensor], weights: Sequence[float], *, gradient: bool
) -> Steps[tuple[float, Tensor | None]]:
    """Mean loss of the examples with ``weights``, and its gradient (n,) with respect to them if ``gradient``."""
    parts = [
        _measure_one(task, mixing, image, weights, gradient)
        for mixing, image in zip(task.examples, references, strict=True)
    ]
    measures = yield from together(*parts)
    loss = sum(value for value, _ in measures) / len(measures)
    gradients = [by_weights for _, by_weights in measures if by_weights is not None]
    return loss, torch.stack(gradients).mean(0) if gradients else None


def _measure_one(
    task: Learning, mixing: Mixing, reference: Tensor, weights: Sequence[float], gradient: bool
) -> Steps[tuple[float, Tensor | None]]:
    options = task.options
    drawing = yield from sample(mixing, weights)
    (image,) = yield [Decode(drawing.latents)]
    answers: Sequence[Scored] = yield [
        Score(image, reference, options.source_prompt, options.target_prompt, options.content_weight, gradient)
    ]
    loss = answers[0].directional + options.content_weight * answers[0].content
    if answers[0].gradient is None:
        return loss, None
    (by_latents,) = yield [PullBackDecode(drawing.latents, answers[0].gradient)]
    return loss, (yield from backward(mixing, drawing, weights, by_latents))
