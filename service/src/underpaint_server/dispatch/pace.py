"""How fast the engine is, from what it reports."""

import time
from collections import deque

_WEIGHT = 0.1
"""Share of a new value in the running mean."""
_RECENT = 32
"""Network passes that ``fast_row_s`` looks back on."""
_STALE_S = 10.0
"""After so long without a pass, nothing is known of the pace any more."""


class Pace:
    """Running means over forward passes; zeros until there was one."""

    def __init__(self) -> None:
        self.row_s = 0.0
        """Seconds of one network row, at the sizes that passes lately had."""
        self._row_s_of: deque[float] = deque(maxlen=_RECENT)
        self.last_pass_at: float | None = None
        """Unix time of the last pass."""
        self._heard = time.monotonic()

    def add(self, rows: int, duration_s: float, now: float) -> None:
        """A pass of ``rows`` network rows (0 for the side stages) was reported; ``now`` is monotonic."""
        self._heard = now
        if rows:
            self.last_pass_at = time.time()
            self.row_s = _blend(self.row_s, duration_s / rows)
            self._row_s_of.append(duration_s / rows)

    def rest(self, now: float) -> None:
        """There was nothing to do until now: silence counts from here."""
        self._heard = now

    def fast_row_s(self, now: float) -> float:
        """Seconds of one row in the fastest of the recent passes; 0 when there was none lately.

        For refusals: one slow pass must not lock callers out, and an idle engine must be tried to be known.
        """
        return min(self._row_s_of, default=0.0) if self.silent_s(now) < _STALE_S else 0.0

    def silent_s(self, now: float) -> float:
        """Seconds since the last pass, or since there was something to do."""
        return now - self._heard


def _blend(mean: float, value: float) -> float:
    return value if mean == 0 else (1 - _WEIGHT) * mean + _WEIGHT * value
