"""The engine's speed, measured from its reports of forward passes."""

import time
from collections import deque

_WEIGHT = 0.1
"""Weight of a new value in the exponential moving average."""
_RECENT = 32
"""Network passes that :meth:`Pace.fast_row_s` takes the minimum of."""
_STALE_S = 10.0
"""Seconds without a pass after which :meth:`Pace.fast_row_s` is unknown (0) until the next pass."""


class Pace:
    """Seconds per network row over recent forward passes; 0 before the first."""

    def __init__(self) -> None:
        self.row_s = 0.0
        """Moving average of the seconds of one network row, at the pass sizes that occurred."""
        self._recent_row_s: deque[float] = deque(maxlen=_RECENT)
        self.last_pass_at: float | None = None
        """Unix time of the last network pass; None before the first."""
        self._last_activity = time.monotonic()

    def add(self, rows: int, duration_s: float, now: float) -> None:
        """Count a pass of ``rows`` network rows (0 for any other kind) that was reported at ``now``, monotonic."""
        self._last_activity = now
        if rows:
            self.last_pass_at = time.time()
            self.row_s = _blend(self.row_s, duration_s / rows)
            self._recent_row_s.append(duration_s / rows)

    def rest(self, now: float) -> None:
        """The engine was idle until ``now``, monotonic: :meth:`silent_s` counts from here."""
        if self.silent_s(now) >= _STALE_S:
            self._recent_row_s.clear()
        self._last_activity = now

    def fast_row_s(self, now: float) -> float:
        """Seconds of one row in the fastest of the recent network passes; 0 if there was none since 10 s without.

        For refusals by deadline: they must not follow from one slow pass, nor from what is known of an idle engine.
        """
        return min(self._recent_row_s, default=0.0) if self.silent_s(now) < _STALE_S else 0.0

    def silent_s(self, now: float) -> float:
        """Seconds from the last pass, or from the end of the last idle time, to ``now``, monotonic."""
        return now - self._last_activity


def _blend(mean: float, value: float) -> float:
    return value if mean == 0 else (1 - _WEIGHT) * mean + _WEIGHT * value
