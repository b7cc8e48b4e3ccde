"""Learning's derivatives on a real network: against plain backpropagation through the whole drawing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.drive import drive
from torch import Tensor
from underpaint_server.backends.model import ModelBackend
from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.jobs import Sampler
from underpaint_server.methods.disentangled.gradient import backward
from underpaint_server.methods.disentangled.steps import Mixing, reference, sample
from underpaint_server.rows import Batch, Decode, Denoise, Embed, PullBack, PullBackDecode, Row, Score

STEPS = 6
WEIGHTS = [1.0, 0.8, 0.6, 0.3, 0.1, -0.1]


@pytest.fixture
def backend(embedded: ModelBackend) -> ModelBackend:
    return embedded


def answer(backend: ModelBackend, row: Row) -> Any:
    return backend.predict(Batch([row], max(1, backend.minimum(type(row)))))[0]


def mixing(backend: ModelBackend, sampler: Sampler) -> Mixing:
    texts = ("a flat red heart on a white background", "a flat blue heart on a white background", "")
    source, target, negative = (answer(backend, Embed(text)).prompt_embeds.clone() for text in texts)
    shape = backend.facts.latent_shape(backend.facts.info.width, backend.facts.info.height)
    start = standard_normal(shape, seed=3, purpose="start")
    return Mixing(backend.facts.schedule.grid(STEPS), source, target, negative, 3.0, sampler, start, None)


def drawn_in_one_graph(backend: ModelBackend, task: Mixing, weights: Tensor) -> Tensor:
    """DDIM with everything kept for backpropagation."""
    unet = backend.network
    x = task.start
    for i, (s, t) in enumerate(zip(task.grid[:0:-1], task.grid[-2::-1], strict=True)):
        text = weights[i] * task.source_embeds + (1 - weights[i]) * task.target_embeds
        pair = torch.stack([task.negative_embeds.double(), text]).float()
        away, towards = unet(torch.stack([x, x]).float(), s.timestep, pair).sample.double()
        e = away + task.guidance_scale * (towards - away)
        x0 = (x - (1 - s.alpha_bar) ** 0.5 * e) / s.alpha_bar**0.5
        x = t.alpha_bar**0.5 * x0 + (1 - t.alpha_bar) ** 0.5 * e
    return x


def test_the_derivative_by_the_weights_is_that_of_full_backpropagation(backend: ModelBackend) -> None:
    task = mixing(backend, Sampler.DDIM)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, requires_grad=True)
    cotangent = standard_normal(tuple(task.start.shape), seed=4, purpose="cotangent")
    (expected,) = torch.autograd.grad(drawn_in_one_graph(backend, task, weights), weights, cotangent)
    run, _ = drive(sample(task, WEIGHTS), lambda row: answer(backend, row))
    found, _ = drive(backward(task, run, WEIGHTS, cotangent), lambda row: answer(backend, row))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_learning_s_derivative_is_that_of_full_backpropagation_where_pixels_saturate(backend: ModelBackend) -> None:
    """Through the sampler, the decoder with its clamp, the CLIP and the autoencoder's features, in one graph."""
    task = replace(mixing(backend, Sampler.DDIM), guidance_scale=12.0)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, requires_grad=True)
    plain, _ = drive(reference(task), lambda row: answer(backend, row))
    (start,) = backend.predict(Batch([Decode(plain)], 2))
    model, loss = backend._model, backend._edit_loss
    assert loss is not None
    images = model.decode(drawn_in_one_graph(backend, task, weights)[None])
    saturated = float((images.abs() == 1).float().mean())
    assert saturated > 0.01, "the case that is meant"
    row = Score(images[0], start, "a red heart", "a blue heart", 0.05, gradient=True)
    total = loss._directional(images, start[None], [row]) + 0.05 * loss._content(images, start[None])
    (expected,) = torch.autograd.grad(total.sum(), weights)

    run, _ = drive(sample(task, WEIGHTS), lambda row: answer(backend, row))
    image = answer(backend, Decode(run.latents))
    scored = answer(backend, Score(image, start, "a red heart", "a blue heart", 0.05, gradient=True))
    by_latents = answer(backend, PullBackDecode(run.latents, scored.gradient))
    found, _ = drive(backward(task, run, WEIGHTS, by_latents), lambda row: answer(backend, row))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_score_s_gradient_is_its_slope(backend: ModelBackend) -> None:
    """By differences along a random direction, through the CLIP and the autoencoder's features."""
    task = mixing(backend, Sampler.DDIM)
    run, _ = drive(sample(task, WEIGHTS), lambda row: answer(backend, row))
    plain, _ = drive(reference(task), lambda row: answer(backend, row))

    def score(latents: Tensor, *, gradient: bool = False) -> Score:
        image, reference = backend.predict(Batch([Decode(latents), Decode(plain)], 2))
        return Score(image, reference, "a red heart", "a blue heart", 0.05, gradient)

    found = answer(backend, score(run.latents, gradient=True))
    slope = answer(backend, PullBackDecode(run.latents, found.gradient))
    direction = slope / slope.norm()

    def loss(by: float) -> float:
        scored = answer(backend, score(run.latents + by * direction))
        return float(scored.directional + 0.05 * scored.content)

    assert (loss(1e-2) - loss(-1e-2)) / 2e-2 == pytest.approx(float(slope.norm()), rel=0.05)


def test_a_row_s_pull_back_is_its_own(backend: ModelBackend, is_invariant: Callable[..., bool]) -> None:
    """Rows of several learners share a pass, and get the bits they get alone: where the way there is independent of the
    size of the batch, the way back is too, and else it is in a pass of the same size."""
    info = backend.facts.info
    size = backend.minimum(PullBack) if is_invariant(info.dtype, info.batch_class) else 8
    task = mixing(backend, Sampler.DDIM)
    rows = [
        PullBack(
            standard_normal(tuple(task.start.shape), seed=k, purpose="x"),
            100 * k + 1,
            0.5,
            (task.source_embeds, task.target_embeds)[k % 2],
            standard_normal(tuple(task.start.shape), seed=k, purpose="v"),
        )
        for k in range(5)
    ]
    together = backend.predict(Batch(rows, 8))
    for row, found in zip(rows, together, strict=True):
        (alone,) = backend.predict(Batch([row], size))
        assert torch.equal(found.latents, alone.latents)
        assert torch.equal(found.prompt_embeds, alone.prompt_embeds)


def test_denoising_is_left_without_gradients(backend: ModelBackend) -> None:
    task = mixing(backend, Sampler.DDIM)
    rows: Sequence[Denoise] = [Denoise(task.start, 501, 0.5, task.source_embeds)]
    assert not answer(backend, rows[0]).requires_grad
    assert not any(weight.requires_grad for weight in backend.network.parameters())
