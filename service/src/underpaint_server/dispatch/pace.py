"""The engine's best speed, measured from its reports of forward passes; for refusals by deadline."""

import time
from collections import OrderedDict
from dataclasses import dataclass
from math import ceil, inf
from typing import Final

from underpaint_server.methods.cost import Plan, Stage

_ENOUGH: Final = 10
"""Network passes of a model and size from which the best pace is known: the first are slow, because much is set up."""
_SIZES: Final = 64
"""Most sizes that are remembered. Callers choose the sizes of generated images."""
_IDLE_S: Final = 10.0
"""Seconds without a pass after which the best pace is taken with a margin."""
_MARGIN: Final = 2.0
"""How many times faster than ever seen an engine may be after an idle time."""


@dataclass(slots=True)
class _Best:
    """The best pace of one model at one image size."""

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
    """The best pace of each model and image size since the server started.

    ``max_rows`` is the largest size of a pass. Times are monotonic, in seconds.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self.last_pass_at: float | None = None
        """Unix time of the last network pass; None before the first."""
        self._best: OrderedDict[tuple[str, int], _Best] = OrderedDict()
        """(model, pixels) -> best pace; the sizes that ran last at the end."""
        self._last_network_pass = -inf

    def add(self, model: str, pixels: int, rows: int, duration_s: float, now: float) -> None:
        """Count a network pass of ``rows`` rows for images of ``pixels`` pixels, reported at ``now``."""
        self.last_pass_at, self._last_network_pass = time.time(), now
        best = self._best.pop((model, pixels), _Best())
        best.add(rows, duration_s)
        self._best[model, pixels] = best
        if len(self._best) > _SIZES:
            self._best.popitem(last=False)

    def least_s(self, model: str, pixels: int, stages: Plan, now: float) -> float:
        """Seconds below which a job with this plan has never been possible; 0 while the pace is not known.

        For refusals by deadline. The pace of an idle engine stays known: an impossible deadline does not become
        possible by waiting.
        """
        best = self._known(model, pixels)
        return 0.0 if best is None else sum(best.least_s(s, self._max_rows) for s in stages) / self._margin(now)

    def least_rows_s(self, model: str, pixels: int, rows: int, now: float) -> float:
        """Seconds below which ``rows`` rows of a job have never been computed; 0 while the pace is not known."""
        best = self._known(model, pixels)
        return 0.0 if best is None else rows * best.row_s / self._margin(now)

    def _known(self, model: str, pixels: int) -> _Best | None:
        best = self._best.get((model, pixels))
        return best if best is not None and best.passes >= _ENOUGH else None

    def _margin(self, now: float) -> float:
        return 1.0 if now - self._last_network_pass < _IDLE_S else _MARGIN
