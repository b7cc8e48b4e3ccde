"""Regions from differences, and random numbers from seeds."""

from typing import Any

import pytest
import torch
from underpaint_server.diffusion import masks
from underpaint_server.diffusion.noise import standard_normal


def test_a_map_without_difference_is_an_empty_mask_and_no_nan() -> None:
    normalised = masks.normalise(torch.zeros(8, 8, dtype=torch.float64))
    assert torch.equal(masks.binarise(normalised, 0.5), torch.zeros(8, 8, dtype=torch.float64))


def test_the_threshold_of_one_half_is_one_and_a_half_means() -> None:
    difference = torch.rand(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    mask = masks.binarise(masks.normalise(difference), 0.5)
    assert torch.equal(mask.bool(), difference > 1.5 * difference.mean())


def test_one_extreme_value_does_not_empty_the_mask() -> None:
    difference = torch.zeros(16, 16, dtype=torch.float64)
    difference[4:8, 4:8] = 1.0
    difference[0, 0] = 50.0
    mask = masks.binarise(masks.normalise(difference), 0.5)
    assert mask[5, 5] == 1.0
    assert mask[12, 12] == 0.0


def test_scale_of_the_difference_does_not_matter() -> None:
    """Guidance multiplies the difference by its weight: the mask stays the same."""
    difference = torch.rand(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(masks.normalise(7.5 * difference), masks.normalise(difference))


def test_a_latent_may_change_if_one_of_its_pixels_may() -> None:
    mask = torch.zeros(16, 16)
    mask[5, 9] = 1
    small = masks.to_latent_size(mask, 4, 4)
    assert small.sum() == 1
    assert small[1, 2] == 1
    assert masks.to_pixel_size(small, 16, 16)[4:8, 8:12].all()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"seed": 1, "purpose": "a"}, {"seed": 2, "purpose": "a"}),
        ({"seed": 1, "purpose": "a"}, {"seed": 1, "purpose": "b"}),
        ({"seed": 1, "purpose": "a", "index": 0}, {"seed": 1, "purpose": "a", "index": 1}),
    ],
)
def test_draws_are_kept_apart_by_seed_purpose_and_index(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert not torch.equal(standard_normal((64,), **one), standard_normal((64,), **other))


def test_draws_come_from_the_seed_alone() -> None:
    torch.manual_seed(0)
    first = standard_normal((4, 8, 8), seed=7, purpose="mask", index=3)
    torch.manual_seed(1)
    torch.randn(10)
    assert torch.equal(first, standard_normal((4, 8, 8), seed=7, purpose="mask", index=3))
    assert first.dtype == torch.float64
    assert abs(float(standard_normal((10_000,), seed=1, purpose="x").std()) - 1) < 0.03
