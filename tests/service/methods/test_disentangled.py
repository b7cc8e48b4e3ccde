"""Mixed prompts and their derivatives, against drawings and gradients made without generators."""

from math import sqrt
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.drive import drive
from torch import Tensor
from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.diffusion.schedule import Schedule, scaled_linear
from underpaint_server.jobs import Descent, LearnOptions, LearnState, Sampler, Search
from underpaint_server.methods.disentangled.gradient import backward
from underpaint_server.methods.disentangled.learn import Learning, learn
from underpaint_server.methods.disentangled.options import step_weights
from underpaint_server.methods.disentangled.steps import Mixing, anchor, reference, sample
from underpaint_server.rows import Decode, Denoise, PullBack, PullBackDecode, Pulled, Row, Score, Scored

SHAPE = (3, 4, 4)
SCHEDULE = Schedule(scaled_linear(), steps_offset=1)
STEPS = 8
WEIGHTS = [1.0, 0.9, 1.1, 0.7, 0.4, 0.2, -0.1, 0.0]
SAMPLERS = pytest.mark.parametrize("sampler", list(Sampler))


class Network(torch.nn.Module):
    """Smooth, nonlinear, and in every latent and every token of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(6, 3, 3, padding=1)
        )
        self.text = torch.nn.Linear(5, 3)
        generator = torch.Generator().manual_seed(3)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) * 0.4
        self.double().requires_grad_(False)

    def forward(self, latents: Tensor, timestep: int, text: Tensor) -> Tensor:
        said = self.text(text.tanh()).mean(0)[:, None, None]
        drawn: Tensor = self.net((latents + said * (1 + timestep / 1000))[None])[0]
        return drawn


NETWORK = Network()


def decode(latents: Tensor) -> Tensor:
    return (1.3 * latents).tanh()


def loss_of(row: Score, image: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - torch.cosine_similarity((image - row.reference).flatten(), torch.ones(48, dtype=image.dtype), 0), (
        image - row.reference
    ).square().mean()


def answer(row: Row) -> Any:
    match row:
        case Denoise():
            return NETWORK(row.latents, row.timestep, row.prompt_embeds)
        case PullBack():
            x, c = (each.detach().requires_grad_() for each in (row.latents, row.prompt_embeds))
            return Pulled(*torch.autograd.grad(NETWORK(x, row.timestep, c), (x, c), row.cotangent))
        case Decode():
            return decode(row.latents)
        case PullBackDecode():
            z = row.latents.detach().requires_grad_()
            return torch.autograd.grad(decode(z), z, row.cotangent)[0]
        case Score():
            image = row.image.detach().requires_grad_()
            directional, content = loss_of(row, image)
            total = directional + row.content_weight * content
            gradient = torch.autograd.grad(total, image)[0] if row.gradient else None
            return Scored(directional.item(), content.item(), gradient)
    raise AssertionError(row)


def mixing(sampler: Sampler, guidance_scale: float = 3.0, seed: int = 1, residuals: bool = False) -> Mixing:
    def normal(shape: tuple[int, ...], purpose: str) -> Tensor:
        return standard_normal(shape, seed=seed, purpose=purpose)

    return Mixing(
        grid=SCHEDULE.grid(STEPS),
        source_embeds=normal((4, 5), "source"),
        target_embeds=normal((4, 5), "target"),
        negative_embeds=normal((4, 5), "negative"),
        guidance_scale=guidance_scale,
        sampler=sampler,
        start=normal(SHAPE, "start"),
        residuals=0.1 * normal((STEPS, *SHAPE), "residuals") if residuals else None,
        probe_residual=0.1 * normal(SHAPE, "probe") if residuals else None,
    )


def drawn_plainly(task: Mixing, weights: Tensor) -> Tensor:
    """The picture's latents by a loop in one autograd graph, written from the formulas of each sampler."""
    x, history = task.start, []
    for i, (s, t) in enumerate(zip(task.grid[:0:-1], task.grid[-2::-1], strict=True)):
        text = weights[i] * task.source_embeds + (1 - weights[i]) * task.target_embeds

        def predict(at: Tensor, timestep: int, text: Tensor = text) -> Any:
            away = NETWORK(at, timestep, task.negative_embeds)
            return away + task.guidance_scale * (NETWORK(at, timestep, text) - away)

        def moved(e: Tensor, x: Tensor = x, s: Any = s, t: Any = t) -> Tensor:
            x0 = (x - sqrt(1 - s.alpha_bar) * e) / sqrt(s.alpha_bar)
            return sqrt(t.alpha_bar) * x0 + sqrt(1 - t.alpha_bar) * e

        history.append(predict(x, s.timestep))
        if task.sampler is Sampler.DDIM:
            e = history[-1]
        elif i == 0:
            probe = moved(history[0]) + (0 if task.probe_residual is None else task.probe_residual)
            e = (history[0] + predict(probe, t.timestep)) / 2
        elif i == 1:
            e = (3 * history[1] - history[0]) / 2
        elif i == 2:
            e = (23 * history[2] - 16 * history[1] + 5 * history[0]) / 12
        else:
            e = (55 * history[i] - 59 * history[i - 1] + 37 * history[i - 2] - 9 * history[i - 3]) / 24
        x = moved(e) + (0 if task.residuals is None else task.residuals[i])
    return x


def options(sampler: Sampler = Sampler.DDIM, **more: Any) -> LearnOptions:
    fields: dict[str, Any] = {
        "source_prompt": "a",
        "target_prompt": "b",
        "negative_prompt": "",
        "num_inference_steps": STEPS,
        "sampler": sampler,
        "guidance_scale": 3.0,
        "switch_step": 4,
        "late_weight": 0.0,
        "content_weight": 0.3,
        "method": Descent(4, 0.05),
        "seed": 0,
    }
    return LearnOptions(**fields | more)


@SAMPLERS
@pytest.mark.parametrize("residuals", [False, True])
def test_a_picture_is_drawn_as_its_sampler_says(sampler: Sampler, residuals: bool) -> None:
    task = mixing(sampler, residuals=residuals)
    run, _ = drive(sample(task, WEIGHTS), answer)
    expected = drawn_plainly(task, torch.tensor(WEIGHTS, dtype=torch.float64))
    assert (run.latents - expected).abs().max() < 1e-12


@SAMPLERS
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("residuals", [False, True])
def test_the_derivative_is_that_of_plain_backpropagation(
    sampler: Sampler, guidance_scale: float, residuals: bool
) -> None:
    task = mixing(sampler, guidance_scale, residuals=residuals)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, requires_grad=True)
    latents = drawn_plainly(task, weights)
    cotangent = standard_normal(SHAPE, seed=2, purpose="cotangent")
    (expected,) = torch.autograd.grad(latents, weights, cotangent)
    run, _ = drive(sample(task, WEIGHTS), answer)
    found, groups = drive(backward(task, run, WEIGHTS, cotangent), answer)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    evaluations = STEPS + (sampler is Sampler.PLMS)
    assert sum(map(len, groups)) == evaluations * (1 if guidance_scale == 1 else 2)
    assert all(len(group) <= 2 for group in groups), "one step at a time, whatever their number"


@SAMPLERS
def test_weight_one_leads_back_to_a_real_picture(sampler: Sampler) -> None:
    source = standard_normal(SHAPE, seed=7, purpose="source")

    def noise(purpose: str, index: int) -> torch.Tensor:
        return standard_normal(SHAPE, seed=7, purpose=purpose, index=index)

    task, groups = drive(anchor(mixing(sampler), source, noise), answer)
    assert len(groups[0]) == 2 * STEPS, "all states are known beforehand: one group"
    back, _ = drive(reference(task), answer)
    assert (back - source).abs().max() < 1e-10
    other, _ = drive(sample(task, [0.0] * STEPS), answer)
    assert (other.latents - source).abs().max() > 1e-2


def test_the_probe_of_a_real_picture_is_the_picture_under_its_own_noise() -> None:
    """Heun's step asks the network about the level it leads to, where a real picture's latents have other noise."""
    source = standard_normal(SHAPE, seed=7, purpose="source")

    def noise(purpose: str, index: int) -> torch.Tensor:
        return standard_normal(SHAPE, seed=7, purpose=purpose, index=index)

    task, _ = drive(anchor(mixing(Sampler.PLMS), source, noise), answer)
    run, _ = drive(sample(task, [1.0] * STEPS), answer)
    assert run.probe is not None
    assert (run.probe - run.states[1]).abs().max() < 1e-12
    level = task.grid[-2]
    own = level.alpha_bar**0.5 * source + (1 - level.alpha_bar) ** 0.5 * noise("anchor", 1)
    assert (run.states[1] - own).abs().max() < 1e-12


@given(st.integers(0, STEPS))
def test_a_switch_is_the_source_prompt_and_then_the_target_prompt(switch: int) -> None:
    task = mixing(Sampler.DDIM, guidance_scale=1.0)
    _, groups = drive(sample(task, step_weights(STEPS, switch, 0.0)), answer)
    texts = [group[0].prompt_embeds for group in groups]
    assert all(torch.equal(text, task.source_embeds) for text in texts[:switch])
    assert all(torch.equal(text, task.target_embeds) for text in texts[switch:])


def learning(
    sampler: Sampler, examples: int = 2, state: LearnState | None = None, iterations: int = 9, **more: Any
) -> Learning:
    mixings = [mixing(sampler, seed=k) for k in range(examples)]
    references = [drive(reference(each), answer)[0] for each in mixings]
    return Learning(mixings, references, options(sampler, **more), state, iterations)


@SAMPLERS
def test_learning_is_adam_on_the_mean_loss(sampler: Sampler) -> None:
    """The same optimiser steps as a plain training loop makes, all examples in common groups."""
    task = learning(sampler)
    found, groups = drive(learn(task), answer)
    weights = torch.tensor(step_weights(STEPS, 4, 0.0), dtype=torch.float64, requires_grad=True)
    adam, losses, tried = torch.optim.Adam([weights], lr=0.05), [], []
    for _ in range(5):
        tried.append(tuple(weights.tolist()))
        parts = []
        for each, plain in zip(task.examples, task.references, strict=True):
            row = Score(plain, decode(plain), "a", "b", 0.3, gradient=False)
            directional, content = loss_of(row, decode(drawn_plainly(each, weights)))
            parts.append(directional + 0.3 * content)
        loss = torch.stack(parts).mean()
        losses.append(float(loss.detach()))
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
    assert found.losses == pytest.approx(losses, abs=1e-12)
    assert found.weights == pytest.approx(tried[-1], abs=1e-10)
    assert found.best_weights == pytest.approx(tried[losses.index(min(losses))], abs=1e-10)
    assert found.iteration == 4
    assert {len(group) for group in groups} == {2, 4}


def test_learning_goes_on_where_it_stopped() -> None:
    """To the last bit, wherever it is cut."""
    whole, _ = drive(learn(learning(Sampler.DDIM)), answer)
    state = None
    for iterations in (1, 2, 5):
        state, _ = drive(learn(learning(Sampler.DDIM, state=state, iterations=iterations)), answer)
    assert state == whole


def test_a_search_keeps_the_best_of_its_candidates() -> None:
    method = Search((2, 4, 6), (0.0, -0.2))
    found, groups = drive(learn(learning(Sampler.DDIM, method=method)), answer)
    assert len(found.losses) == 6
    candidates = [step_weights(STEPS, s, w) for s in method.switch_steps for w in method.late_weights]
    assert found.best_weights == found.weights == candidates[found.losses.index(min(found.losses))]
    assert not any(isinstance(row, PullBack | PullBackDecode) for group in groups for row in group)
    assert max(map(len, groups)) == 6 * 2 * 2, "all candidates and examples side by side"
