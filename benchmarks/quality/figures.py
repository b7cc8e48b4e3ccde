"""Statistics as cells of tables: figures with their spread, and claims."""

from collections.abc import Callable, Sequence
from math import sqrt
from statistics import mean, stdev
from typing import TypeVar

import numpy as np

from benchmarks.cases import KINDS

T = TypeVar("T")
ENOUGH = 30
"""Fewest cases for a claim without a warning."""


def quartiles(values: Sequence[float], digits: int = 2) -> str:
    """Median with the first and the third quartile."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def mean_error(values: Sequence[float], digits: int = 2) -> str:
    """Mean with its standard error, which a single value lacks."""
    spread = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def share(values: Sequence[bool]) -> str:
    """Share of true values with its standard error.

    The error is computed with one more true and one more false value, so that it is not 0 for 0 of 12.
    """
    smoothed = (sum(values) + 1) / (len(values) + 2)
    return f"{mean(values):.2f} ± {sqrt(smoothed * (1 - smoothed) / (len(values) + 2)):.2f}"


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single value."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0


def columns(models: Sequence[str]) -> tuple[str, ...]:
    """Column heads: every kind of edit and "all", for each model, with its name if there are several."""
    return tuple(of(models, model) + kind for model in models for kind in (*KINDS, "all"))


def of(models: Sequence[str], model: str) -> str:
    """Prefix of a text about one model: its name and a colon, or nothing if there is only one model."""
    return f"{model}: " if len(models) > 1 else ""


def cells(
    items: Sequence[T], model_of: Callable[[T], str], kind_of: Callable[[T], str], models: Sequence[str],
    cell: Callable[[Sequence[T]], str],
) -> tuple[str, ...]:  # fmt: skip
    """One cell for each of :func:`columns`."""
    row = []
    for model in models:
        mine = [item for item in items if model_of(item) == model]
        row += [cell([item for item in mine if kind_of(item) == kind]) for kind in KINDS] + [cell(mine)]
    return tuple(row)


def claim(text: str, gains: Sequence[float], *, unit: str = "", digits: int = 3) -> str:
    """A sentence that says whether a claim holds: the mean paired difference against twice its standard error.

    ``gains`` are the paired differences, positive where a case supports the claim; ``unit`` follows the figures.
    """
    middle, error = mean(gains), standard_error(gains)
    verdict = "is not seen here"
    if abs(middle) > 2 * error:
        verdict = "holds here" if middle > 0 else "does NOT hold here"
    if len(gains) < ENOUGH:
        verdict += ", of too few cases to be sure"
    difference = f"paired difference {middle:+.{digits}f} ± {error:.{digits}f}{unit}"
    return f"*{text}*: {verdict} ({difference}, {len(gains)} cases)."
