"""The share of device time that learning may use while other jobs wait. Works on durations; reads no clock."""

MEMORY_S = 20.0
"""Time constant of the decaying sums, in busy seconds: device time this long ago counts about a third (1/e)."""


class Share:
    """Keeps learning's share of the device time below ``limit``, (0, 1], while other jobs wait."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._learning_s = 0.0
        self._total_s = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the next pass may go to learning although other jobs wait."""
        return self._learning_s <= self._limit * self._total_s

    def spend(self, duration_s: float, learning: float) -> None:
        """Count a pass of ``duration_s`` seconds; ``learning``, 0 to 1, is the share of its rows that were learning's.

        To be called only for passes while other jobs are present.
        """
        kept = max(0.0, 1 - duration_s / MEMORY_S)
        self._learning_s = kept * self._learning_s + learning * duration_s
        self._total_s = kept * self._total_s + duration_s
