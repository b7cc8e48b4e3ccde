"""Mixing activations: what holds for every pair of them."""

from math import acos, sin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from underpaint_server.diffusion import features
from underpaint_server.diffusion.ddim import move, pred_x0, redirect, step
from underpaint_server.diffusion.features import PARALLEL, calibrate, inject, to_feature_size, to_half
from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.diffusion.schedule import Level
from underpaint_server.jobs import Interpolation

SLERP, LERP = Interpolation.SLERP, Interpolation.LERP
SHAPE = (3, 4, 4)
weights = st.floats(0, 1)
scales = st.sampled_from([1e-20, 1e-6, 1.0, 1e3, 1e18])
seeds = st.integers(0, 1000)


def activation(seed: int, scale: float = 1.0) -> Tensor:
    return (standard_normal(SHAPE, seed=seed, purpose="h") * scale).float()


def cosine(one: Tensor, other: Tensor) -> float:
    one, other = one.double().flatten(), other.double().flatten()
    return float(one @ other / (one.norm() * other.norm()))


@given(seeds, seeds, scales, scales, weights)
def test_slerp_keeps_the_norm_and_turns_by_its_share_of_the_angle(
    a: int, b: int, scale: float, other: float, w: float
) -> None:
    own, content = activation(a, scale), activation(b, other)
    mixed = inject(own, content, w, SLERP)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double().norm(), own.double().norm(), rtol=1e-5, atol=0)
    if abs(cosine(own, content)) < PARALLEL:
        assert acos(min(1.0, cosine(mixed, own))) == pytest.approx(w * acos(cosine(own, content)), abs=2e-3)


@given(seeds, weights, scales)
def test_equal_activations_come_back(seed: int, w: float, scale: float) -> None:
    own = activation(seed, scale)
    for way in Interpolation:
        assert torch.equal(inject(own, own.clone(), w, way), own)


@given(seeds, weights, st.floats(-1e-3, 1e-3), st.sampled_from([-1.0, 1.0]))
def test_no_pair_gives_anything_but_numbers(seed: int, w: float, aside: float, sign: float) -> None:
    own = activation(seed)
    near = sign * own + aside * activation(seed + 1)
    for content in (near, torch.zeros(SHAPE), own * 1e-30, own * 1e30):
        for way in Interpolation:
            for one, other in ((own, content), (content, own)):
                assert bool(inject(one, other, w, way).isfinite().all())


@given(seeds, st.sampled_from(list(Interpolation)))
def test_without_a_norm_nothing_can_be_put_in(seed: int, way: Interpolation) -> None:
    nothing, own = torch.zeros(SHAPE), activation(seed)
    assert torch.equal(inject(own, nothing, 0.5, way), own)
    assert torch.equal(inject(nothing, own, 0.5, way), nothing)


def test_weight_nothing_is_the_very_same_and_weight_one_the_content_at_our_norm() -> None:
    own, content = activation(1), activation(2, 7.0)
    for way in Interpolation:
        assert inject(own, content, 0.0, way, torch.full((4, 4), 0.3)) is own
        expected = content * (own.norm() / content.norm())
        torch.testing.assert_close(inject(own, content, 1.0, way), expected)


def test_slerp_is_the_papers_formula_and_lerp_falls_short_of_it() -> None:
    own, content = activation(1).double(), activation(2, 5.0).double()
    angle = acos(cosine(own, content))
    scaled = content * own.norm() / content.norm()
    expected = (sin(0.7 * angle) * own + sin(0.3 * angle) * scaled) / sin(angle)
    torch.testing.assert_close(inject(own, content, 0.3, SLERP), expected)
    assert float(inject(own, content, 0.5, LERP).norm()) < 0.9 * float(own.norm())


@given(seeds, st.floats(0.01, 1), scales)
def test_a_region_is_normalised_inside_and_leaves_the_outside(seed: int, w: float, scale: float) -> None:
    """Loud content outside the region must not make it quiet inside."""
    own, content = activation(seed), activation(seed + 1, scale)
    region = torch.zeros(4, 4)
    region[1:3, 1:] = 1
    content[:, 0] *= 1e6
    mixed = inject(own, content, w, SLERP, region)
    outside = region == 0
    assert torch.equal(mixed[:, outside], own[:, outside])
    torch.testing.assert_close(mixed[:, ~outside].norm(), own[:, ~outside].norm(), rtol=1e-4, atol=0)
    expected = inject(own[:, ~outside], content[:, ~outside], w, SLERP)
    torch.testing.assert_close(mixed[:, ~outside], expected, rtol=1e-4, atol=1e-4)


def test_a_cell_partly_in_the_region_takes_part_of_it() -> None:
    region = torch.zeros(8, 8, dtype=torch.float64)
    region[:, :3] = 1
    assert to_feature_size(region, 2, 4)[0].tolist() == [1.0, 0.5, 0.0, 0.0]


def test_calibration_moves_by_the_matched_difference() -> None:
    """Item by item from the definition: variance match, difference of clean pictures, difference of noise."""
    level, omega = Level(601, 0.2), 0.3
    x, eps, mapped = (standard_normal((4, 8, 8), seed=s, purpose="c") for s in range(3))
    mapped = 1.7 * mapped + 0.4
    p, q = pred_x0(x, eps, 0.2), pred_x0(x, mapped, 0.2)
    q = q.mean() + (q - q.mean()) * p.std() / q.std()
    torch.testing.assert_close(q.std(), p.std())
    expected = x + 0.2**0.5 * (q - p) + omega * 0.8**0.5 * (mapped - eps)
    torch.testing.assert_close(calibrate(x, eps, mapped, level, omega), expected)
    torch.testing.assert_close(calibrate(x, eps, eps, level, omega), x)


@given(seeds, st.floats(0, 1))
def test_calibration_of_anything_gives_numbers(seed: int, omega: float) -> None:
    x = standard_normal((4, 8, 8), seed=seed, purpose="x")
    constant = x / (1 - 0.2) ** 0.5  # its clean picture is 0 everywhere: no spread to match
    assert bool(calibrate(x, x, constant, Level(601, 0.2), omega).isfinite().all())


def test_the_step_takes_the_picture_from_one_prediction_and_the_noise_from_the_other() -> None:
    s, t = Level(601, 0.2), Level(581, 0.25)
    x, eps, mapped = (standard_normal((4, 8, 8), seed=n, purpose="a") for n in range(3))
    expected = t.alpha_bar**0.5 * pred_x0(x, mapped, s.alpha_bar) + (1 - t.alpha_bar) ** 0.5 * eps
    torch.testing.assert_close(redirect(step(x, eps, s, t), eps, mapped, s, t), expected)
    assert torch.equal(redirect(step(x, eps, s, t), eps, eps.clone(), s, t), move(x, eps, s, t))


def test_eta_one_is_the_step_of_ddpm() -> None:
    """Mean and variance of the posterior q(x_t | x_s, x_0), which is what eta 1 stands for."""
    s, t = Level(601, 0.2), Level(581, 0.25)
    x, eps, z = (standard_normal((4, 8, 8), seed=n, purpose="b") for n in range(3))
    alpha = s.alpha_bar / t.alpha_bar
    x0 = pred_x0(x, eps, s.alpha_bar)
    mean = (t.alpha_bar**0.5 * (1 - alpha) * x0 + alpha**0.5 * (1 - t.alpha_bar) * x) / (1 - s.alpha_bar)
    variance = (1 - t.alpha_bar) / (1 - s.alpha_bar) * (1 - alpha)
    torch.testing.assert_close(step(x, eps, s, t, z), mean + variance**0.5 * z)
    torch.testing.assert_close(step(x, eps, s, Level(0, 1.0), z), x0)


def test_activations_beyond_half_precision_become_its_largest_number() -> None:
    stored = to_half(torch.tensor([1e9, -1e9, 0.5]))
    assert stored.dtype == torch.float16
    assert stored.tolist() == [65504.0, -65504.0, 0.5]
    assert bool(features.inject(stored.float(), stored, 0.5, SLERP).isfinite().all())
