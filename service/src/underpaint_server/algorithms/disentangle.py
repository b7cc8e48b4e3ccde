"""Disentangled edits: two prompts mixed with one weight a step (Wu, Zhao, Zhang, Yang, Jia, Zhang; CVPR 2023).

The network is told ``c_i = lam_i c_source + (1 - lam_i) c_target`` at step i (section 4.1), everything else stays: the
noise, the guidance, the sampler. Early steps lay out the picture and late ones fill in attributes, so weights of 1
before 0 change the attribute and keep the layout (section 3); about 50 learned ones do it better (section 4.2), and on
other pictures too.

A real picture is brought along by the noise that its own noised versions leave over: ``r_i`` is what the step at
weight 1 misses between them. With the residuals added after every step, weight 1 everywhere leads back to the picture.

Learning needs the derivative of a loss of the final picture by every weight. The states of one run are kept, and the
adjoint walks back over them one step at a time (:func:`backward`): exact, in the memory of one step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from underpaint_server.diffusion.ddim import add_noise, coefficients, move
from underpaint_server.diffusion.multistep import is_heun, multistep_weights
from underpaint_server.diffusion.sampling import Guidance, guided, together
from underpaint_server.diffusion.schedule import Level
from underpaint_server.diffusion.tasks import Editing, Learning, Mixing, Outcome
from underpaint_server.jobs import Descent, DisentangledEdit, LearnState, Search
from underpaint_server.rows import Decode, PullBack, PullBackDecode, Score, Scored, Steps


def edit(task: Editing) -> Steps[Outcome]:
    """Draw the picture with the method's weights."""
    assert isinstance(task.method, DisentangledEdit)
    assert task.mixing is not None
    run = yield from sample(task.mixing, task.method.weights)
    return Outcome(run.latents)


def anchor(mixing: Mixing, source: Tensor, noise: Sequence[Tensor]) -> Steps[Mixing]:
    """The same mixing with the start and the residuals of a real picture (section 4.3 and the authors' code).

    ``source`` (c, h, w) is noised to every level with noise of its own. These states are known beforehand, so all
    their predictions are asked for in one group.
    """
    states = [add_noise(source, each, noisy) for each, (noisy, _) in zip(noise, _steps(mixing), strict=True)]
    ends = [*states[1:], source]
    asked = [_predict(mixing, x, noisy, 1.0) for x, (noisy, _) in zip(states, _steps(mixing), strict=True)]
    run = _Run(states, list((yield from together(*asked))))
    residuals = []
    for i, (noisy, clean) in enumerate(_steps(mixing)):
        mean = yield from _mean(mixing, run, i, 1.0)
        residuals.append(ends[i] - move(states[i], mean, noisy, clean))
    return replace(mixing, start=states[0], residuals=torch.stack(residuals))


# --- forward ------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Run:
    """One drawing of a picture: all that its derivative needs."""

    states: list[Tensor]
    """x_0 .. x_n (c, h, w), noisiest first."""
    noise_preds: list[Tensor] = field(default_factory=list)
    """Guided, at x_0 .. x_(n-1)."""
    probe: Tensor | None = None
    """Where Heun's step looked ahead."""

    @property
    def latents(self) -> Tensor:
        """The picture's, (c, h, w)."""
        return self.states[-1]


def sample(mixing: Mixing, weights: Sequence[float]) -> Steps[_Run]:
    """Draw the picture under ``weights``, one a step, noisiest first."""
    run = _Run([mixing.start])
    for i, (noisy, clean) in enumerate(_steps(mixing)):
        run.noise_preds.append((yield from _predict(mixing, run.states[i], noisy, weights[i])))
        mean = yield from _mean(mixing, run, i, weights[i])
        latents = move(run.states[i], mean, noisy, clean)
        run.states.append(latents if mixing.residuals is None else latents + mixing.residuals[i])
    return run


def _steps(mixing: Mixing) -> list[tuple[Level, Level]]:
    return list(zip(mixing.grid[:0:-1], mixing.grid[-2::-1], strict=True))


def _predict(mixing: Mixing, latents: Tensor, level: Level, weight: float) -> Steps[Tensor]:
    guidance = Guidance(_mixed(mixing, weight), mixing.negative_embeds, mixing.guidance_scale)
    return (yield from guided(latents, level, guidance))


def _mixed(mixing: Mixing, weight: float) -> Tensor:
    return weight * mixing.source_embeds + (1 - weight) * mixing.target_embeds


def _mean(mixing: Mixing, run: _Run, i: int, weight: float) -> Steps[Tensor]:
    """The prediction that step ``i`` moves along."""
    now = run.noise_preds[i]
    if is_heun(mixing.sampler, i):
        noisy, clean = _steps(mixing)[0]
        run.probe = move(run.states[0], now, noisy, clean)
        ahead = yield from _predict(mixing, run.probe, clean, weight)
        return (now + ahead) / 2
    shares = multistep_weights(mixing.sampler, i)
    if len(shares) == 1:
        return now
    return torch.stack([share * run.noise_preds[i - j] for j, share in enumerate(shares)]).sum(0)


# --- backward -----------------------------------------------------------------------------------------------------


def backward(mixing: Mixing, run: _Run, weights: Sequence[float], by_latents: Tensor) -> Steps[Tensor]:
    """Derivative (n,) of a loss by the weights, from its derivative by the picture's latents.

    With ``x_(i+1) = a_i x_i + b_i sum_j w_ij e_(i-j) + r_i``, the adjoint g of x falls from clean to noisy:
    each e_(i-j) gets ``w_ij b_i g``, and g becomes ``a_i g`` plus what the network pulls back of e_i's own.
    """
    by_x, by_pred = by_latents, [torch.zeros_like(by_latents) for _ in weights]
    by_weights = [0.0] * len(weights)
    for i, (noisy, clean) in reversed(list(enumerate(_steps(mixing)))):
        a, b = coefficients(noisy, clean)
        if is_heun(mixing.sampler, i):  # the first step: nobody asks for the derivative by its start
            assert run.probe is not None
            ahead, by_weights[i] = yield from _pull(mixing, run.probe, clean, weights[i], by_x * (b / 2))
            by_pred[i] = by_pred[i] + by_x * (b / 2) + ahead * b
        else:
            for j, share in enumerate(multistep_weights(mixing.sampler, i)):
                by_pred[i - j] = by_pred[i - j] + share * b * by_x
        pulled, by_weight = yield from _pull(mixing, run.states[i], noisy, weights[i], by_pred[i])
        by_weights[i] += by_weight
        by_x = a * by_x + pulled
    return torch.tensor(by_weights, dtype=torch.float64)


def _pull(
    mixing: Mixing, latents: Tensor, level: Level, weight: float, cotangent: Tensor
) -> Steps[tuple[Tensor, float]]:
    """Derivatives by the latents (c, h, w) and by the weight, from that by the guided prediction."""
    w = mixing.guidance_scale
    towards = PullBack(latents, level.timestep, level.alpha_bar, _mixed(mixing, weight), w * cotangent)
    rows = [towards]
    if w != 1.0:
        rows.append(replace(towards, prompt_embeds=mixing.negative_embeds, cotangent=(1 - w) * cotangent))
    answers = yield rows
    slope = (mixing.source_embeds - mixing.target_embeds).double()
    by_weight = float((answers[0].prompt_embeds * slope).sum())
    return torch.stack([answer.latents for answer in answers]).sum(0), by_weight


# --- learn --------------------------------------------------------------------------------------------------------


def reference(mixing: Mixing) -> Steps[Tensor]:
    """Latents (c, h, w) of the unedited picture: all weights 1."""
    run = yield from sample(mixing, [1.0] * (len(mixing.grid) - 1))
    return run.latents


def learn(task: Learning) -> Steps[LearnState]:
    """Weights of a smaller loss, averaged over the examples."""
    images = yield [Decode(latents) for latents in task.references]
    if isinstance(task.options.method, Descent):
        return (yield from _descend(task, images, task.options.method))
    return (yield from _search(task, images, task.options.method))


def _descend(task: Learning, references: Sequence[Tensor], method: Descent) -> Steps[LearnState]:
    """Adam on the weights. The loss is measured before each step, and once after the last, so that the best weights
    are known by measurement."""
    state = task.state or _beginning(task)
    last = min(method.optimization_steps, state.iteration + task.iterations)
    while state.iteration < last:
        loss, gradient = yield from _measure(task, references, state.weights, gradient=True)
        assert gradient is not None
        state = _stepped(_seen(state, loss), gradient, method)
    if state.iteration == method.optimization_steps:
        loss, _ = yield from _measure(task, references, state.weights, gradient=False)
        state = _seen(state, loss)
    return state


def _search(task: Learning, references: Sequence[Tensor], method: Search) -> Steps[LearnState]:
    """The best of all step functions offered (section 3's finding as the whole answer)."""
    candidates = [
        step_weights(task.options.num_inference_steps, switch, late)
        for switch in method.switch_steps
        for late in method.late_weights
    ]
    found = yield from together(*(_measure(task, references, weights, gradient=False) for weights in candidates))
    state = _beginning(task)
    for weights, (loss, _) in zip(candidates, found, strict=True):
        state = _seen(replace(state, weights=weights), loss)
    return replace(state, iteration=1, weights=state.best_weights)


def step_weights(steps: int, switch_step: int, late_weight: float) -> tuple[float, ...]:
    """1 for the first ``switch_step`` of ``steps`` weights, ``late_weight`` after."""
    return (1.0,) * switch_step + (late_weight,) * (steps - switch_step)


def _beginning(task: Learning) -> LearnState:
    options = task.options
    weights = step_weights(options.num_inference_steps, options.switch_step, options.late_weight)
    zeros = (0.0,) * len(weights)
    return LearnState(0, weights, zeros, zeros, (), weights)


def _seen(state: LearnState, loss: float) -> LearnState:
    is_best = not state.losses or loss < min(state.losses)
    best = state.weights if is_best else state.best_weights
    return replace(state, losses=(*state.losses, loss), best_weights=best)


def _stepped(state: LearnState, gradient: Tensor, method: Descent) -> LearnState:
    weights = torch.tensor(state.weights, dtype=torch.float64)
    weights.grad = gradient
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
    """Mean loss of the examples under ``weights``, and its derivative (n,) by them where asked for."""
    parts = [
        _measure_one(task, mixing, image, weights, gradient)
        for mixing, image in zip(task.examples, references, strict=True)
    ]
    found = yield from together(*parts)
    loss = sum(value for value, _ in found) / len(found)
    gradients = [each for _, each in found if each is not None]
    return loss, torch.stack(gradients).mean(0) if gradients else None


def _measure_one(
    task: Learning, mixing: Mixing, reference: Tensor, weights: Sequence[float], gradient: bool
) -> Steps[tuple[float, Tensor | None]]:
    options = task.options
    run = yield from sample(mixing, weights)
    (image,) = yield [Decode(run.latents)]
    answers: Sequence[Scored] = yield [
        Score(image, reference, options.source_prompt, options.target_prompt, options.content_weight, gradient)
    ]
    loss = answers[0].directional + options.content_weight * answers[0].content
    if answers[0].gradient is None:
        return loss, None
    (by_latents,) = yield [PullBackDecode(run.latents, answers[0].gradient)]
    return loss, (yield from backward(mixing, run, weights, by_latents))
