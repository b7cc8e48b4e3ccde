"""EDICT: exact inversion with coupled latents (Wallace, Gokul, Naik; CVPR 2023; arXiv 2211.12446).

Two latents x and y are at the same level. A step changes one of them with the noise prediction *for the other*, so that
its inverse can use the same prediction and is exact (eqs. 11-15). Two details are only in the authors' code and change
the result: which of the two is changed first alternates with the step number, counted in the used part of the schedule;
and the mixing after it always changes x first.
"""

from torch import Tensor

from underpaint_server.diffusion.ddim import coefficients
from underpaint_server.diffusion.sampling import Guidance, guided
from underpaint_server.diffusion.schedule import Level, downwards
from underpaint_server.diffusion.snap import snap
from underpaint_server.jobs import InversionOptions
from underpaint_server.methods.edict.options import EdictInversion
from underpaint_server.methods.task import Editing, Inverting, Outcome
from underpaint_server.rows import Steps


def invert(task: Inverting) -> Steps[dict[str, Tensor]]:
    """Invert: ``source``, and the coupled latents ``x`` and ``y`` (c, h, w), float64, at the noisiest level of the
    grid.

    ``x`` and ``y`` differ: each step multiplies their difference by p^-2.
    """
    p = _mixing_coefficient(task.options)
    x, y = task.source, task.source
    for i, (_, noisy, clean) in reversed(list(enumerate(downwards(task.grid)))):
        y = (y - (1 - p) * x) / p
        x = (x - (1 - p) * y) / p
        if i % 2 == 0:
            y = yield from _undo(y, x, noisy, clean, task.guidance)
            x = yield from _undo(x, y, noisy, clean, task.guidance)
        else:
            x = yield from _undo(x, y, noisy, clean, task.guidance)
            y = yield from _undo(y, x, noisy, clean, task.guidance)
    return {"source": task.source, "x": x, "y": y}


def from_noise(noise: Tensor) -> dict[str, Tensor]:
    """The pair of a generated source: both are the noise (c, h, w) that it is generated from."""
    return {"x": noise, "y": noise}


def edit(task: Editing[object, None]) -> Steps[Outcome]:
    """Denoise the coupled latents with the target prompt; the result is x.

    With the prompt and the guidance scale of the inversion this is its exact inverse.
    """
    p, x, y = _mixing_coefficient(task.inversion), task.arrays["x"], task.arrays["y"]
    for i, (_, noisy, clean) in enumerate(downwards(task.grid)):
        if i % 2 == 0:
            x = yield from _do(x, y, noisy, clean, task.guidance)
            y = yield from _do(y, x, noisy, clean, task.guidance)
        else:
            y = yield from _do(y, x, noisy, clean, task.guidance)
            x = yield from _do(x, y, noisy, clean, task.guidance)
        x = p * x + (1 - p) * y
        y = p * y + (1 - p) * x
    return Outcome(x)


def _mixing_coefficient(options: InversionOptions | None) -> float:
    """EDICT's p."""
    assert options is not None
    assert isinstance(options.method, EdictInversion)
    return options.method.mixing_coefficient


def _do(one: Tensor, other: Tensor, noisy: Level, clean: Level, guidance: Guidance) -> Steps[Tensor]:
    a, b = coefficients(noisy, clean)
    noise_pred = yield from guided(snap(other), noisy, guidance)
    return a * one + b * noise_pred


def _undo(one: Tensor, other: Tensor, noisy: Level, clean: Level, guidance: Guidance) -> Steps[Tensor]:
    a, b = coefficients(noisy, clean)
    noise_pred = yield from guided(snap(other), noisy, guidance)
    return (one - b * noise_pred) / a
