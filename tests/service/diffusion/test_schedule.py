"""Levels and grids against the values that the literature and diffusers give."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from underpaint_server.diffusion.ddim import coefficients, epsilon_from_v, epsilon_from_x0, move, pred_x0
from underpaint_server.diffusion.schedule import Level, Schedule, Spacing, scaled_linear

SD = Schedule(scaled_linear(), steps_offset=1)


def test_alphas_are_those_of_stable_diffusion() -> None:
    known = {0: 0.99915, 1: 0.99830, 20: 0.98131, 481: 0.3023, 781: 0.0435, 981: 0.00578, 999: 0.00466}
    for timestep, value in known.items():
        assert SD.alphas_cumprod[timestep] == pytest.approx(value, rel=2e-3)


def test_fifty_steps_are_those_of_diffusers() -> None:
    assert [level.timestep for level in SD.grid(50)][1:] == list(range(1, 1000, 20))


def test_the_clean_level_is_that_of_timestep_0_or_no_noise_at_all() -> None:
    assert SD.grid(50)[0].alpha_bar == SD.alphas_cumprod[0]
    assert Schedule(SD.alphas_cumprod, set_alpha_to_one=True).grid(50)[0].alpha_bar == 1.0


@given(steps=st.integers(1, 200), spacing=st.sampled_from(Spacing))
def test_a_grid_rises_in_noise_and_stays_within_training(steps: int, spacing: Spacing) -> None:
    grid = Schedule(SD.alphas_cumprod, spacing=spacing, set_alpha_to_one=True).grid(steps)
    assert len(grid) == steps + 1
    assert all(low.alpha_bar > high.alpha_bar for low, high in pairwise(grid))
    assert all(0 <= level.timestep < 1000 for level in grid)


def test_the_used_part_is_the_clean_end() -> None:
    assert SD.grid(50, used=40) == SD.grid(50)[:41]


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_a_step_equals_diffusers(spacing: str) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(20)
    grid = Schedule(scaled_linear(), spacing=Spacing(spacing), steps_offset=1).grid(20)
    generator = torch.Generator().manual_seed(0)
    x, e = torch.randn((2, 4, 8, 8), generator=generator, dtype=torch.float64)
    for i in range(20, 0, -1):
        theirs = scheduler.step(e, grid[i].timestep, x).prev_sample
        torch.testing.assert_close(move(x, e, grid[i], grid[i - 1]), theirs, rtol=1e-5, atol=1e-5)


@given(low=st.integers(0, 998), gap=st.integers(1, 500))
def test_a_move_and_its_way_back_cancel(low: int, gap: int) -> None:
    s, t = (Level(k, SD.alphas_cumprod[k]) for k in (low, min(999, low + gap)))
    x = torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(1, 8, 8)
    e = x.cos()
    torch.testing.assert_close(move(move(x, e, s, t), e, t, s), x, rtol=0, atol=1e-12)


def test_coefficients_are_the_move() -> None:
    s, t = SD.grid(50)[30], SD.grid(50)[29]
    a, b = coefficients(s, t)
    assert a > 1 > 0 > b


def test_other_predictions_are_the_same_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn((2, 4, 8, 8), generator=generator, dtype=torch.float64)
    abar = 0.3
    x = abar**0.5 * x0 + (1 - abar) ** 0.5 * noise
    v = abar**0.5 * noise - (1 - abar) ** 0.5 * x0
    level = torch.tensor(abar, dtype=torch.float64)
    torch.testing.assert_close(epsilon_from_v(x, v, level), noise)
    torch.testing.assert_close(epsilon_from_x0(x, x0, level), noise)
    torch.testing.assert_close(pred_x0(x, noise, abar), x0)


def test_without_noise_a_predicted_image_is_no_noise() -> None:
    """In one batch with images that have noise: no image changes another's."""
    x, x0 = torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0.requires_grad_()
    abars = torch.tensor([0.3, 1.0, 0.9], dtype=torch.float64)
    preds = epsilon_from_x0(x, x0, abars.reshape(-1, 1, 1, 1))
    assert torch.equal(preds[1], torch.zeros_like(x[1]))
    for i in (0, 2):
        assert torch.equal(preds[i], epsilon_from_x0(x[i], x0[i], abars[i]))
    (gradient,) = torch.autograd.grad(preds.sum(), x0)
    assert bool(gradient.isfinite().all())
