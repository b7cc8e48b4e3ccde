"""The pictures that stand in for photographs."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from benchmarks import cases
from benchmarks.photo_like import hills, shaded_ball, texture


@pytest.mark.parametrize("draw", [shaded_ball, hills])
def test_they_are_what_icons_are_not_and_the_same_every_time(draw: Callable[[], Image.Image]) -> None:
    photo = draw()
    assert photo.tobytes() == draw().tobytes()
    small = np.asarray(photo.resize((64, 64), Image.Resampling.LANCZOS))
    assert flat(small) < 0.05 < 0.3 < np.median([flat(case.source) for case in cases.load()])


def flat(pixels: np.ndarray) -> float:
    """Share of pixels equal to their neighbour on the right."""
    return float((np.diff(pixels.astype(int), axis=1) == 0).all(2).mean())


def test_a_rougher_texture_has_more_of_the_small() -> None:
    def steps(rough: float) -> float:
        return float(np.abs(np.diff(texture(64, rough, 1))).mean())

    assert steps(0.5) > 2 * steps(2.0)
