"""The engine's speed, measured from its reports of forward passes."""

import time
from dataclasses import dataclass
from math import ceil, inf
from typing import Final

from underpaint_server.methods.cost import Plan, Stage

_WEIGHT: Final = 0.1
"""Weight of a new value in the exponential moving average."""
_ENOUGH: Final = 10
"""Network passes of a model from which its best pace is known: the first ones are slow, because much is set up."""
_IDLE_S: Final = 10.0
"""Seconds without a pass after which the best pace is taken with a margin."""
_MARGIN: Final = 2.0
"""How many times faster than ever seen an engine may be after an idle time."""


@dataclass(slots=True)
class _Best:
    """The best pace of one model since the server started."""

    passes: int = 0
    pass_s: float = inf
    """Shortest network pass of any size."""
    row_s: float = inf
    """Fewest seconds of a pass per row of a job."""
    widest: int = 0
    """Most rows of a pass."""

    def add(self, rows: int, duration_s: float) -> None:
        self.passes += 1
        self.pass_s = min(self.pass_s, duration_s)
        self.row_s = min(self.row_s, duration_s / rows)
        self.widest = max(self.widest, rows)

    def least_s(self, stage: Stage, max_rows: int) -> float:
        """Seconds below which a stage has never been possible, with passes of at most ``max_rows`` rows.

        It needs a pass for each step at least, and no pass was faster than the fastest. The pace of a row counts only
        where passes were as wide as the stage's can be: on a GPU, many rows in one pass may cost no more than one.
        """
        by_passes_s = max(stage.steps, ceil(stage.rows / max_rows)) * self.pass_s
        is_known = self.widest >= min(max_rows, ceil(stage.rows / stage.steps))
        return max(by_passes_s, stage.rows * self.row_s if is_known else 0.0)


class Pace:
    """Seconds per network row over recent forward passes, 0 before the first; and the best pace of each model."""

    def __init__(self, max_rows: int) -> None:
        """``max_rows`` is the largest size of a pass."""
        self._max_rows = max_rows
        self.row_s = 0.0
        """Moving average of the seconds of one network row, at the pass sizes that occurred."""
        self.last_pass_at: float | None = None
        """Unix time of the last network pass; None before the first."""
        self._best: dict[str, _Best] = {}
        self._last_network_pass = -inf

    def add(self, model: str, rows: int, duration_s: float, now: float) -> None:
        """Count a pass of ``rows`` network rows (0 for any other kind) that was reported at ``now``, monotonic."""
        if rows:
            self.last_pass_at, self._last_network_pass = time.time(), now
            self.row_s = _blend(self.row_s, duration_s / rows)
            self._best.setdefault(model, _Best()).add(rows, duration_s)

    def least_s(self, model: str, stages: Plan, rows_ahead: int, now: float) -> float:
        """Seconds below which a job with this plan has never been possible; 0 while the model's pace is not known.

        For refusals by deadline. ``rows_ahead`` are rows of other jobs that go first. The pace of an idle engine stays
        known: an impossible deadline does not become possible by waiting.
        """
        best = self._best.get(model)
        if best is None or best.passes < _ENOUGH:
            return 0.0
        least_s = sum(best.least_s(stage, self._max_rows) for stage in stages) + rows_ahead * best.row_s
        return least_s if now - self._last_network_pass < _IDLE_S else least_s / _MARGIN


def _blend(mean: float, value: float) -> float:
    return value if mean == 0 else (1 - _WEIGHT) * mean + _WEIGHT * value
