"""How much of the device learning gets while other work waits. Plain numbers, no clock of its own."""

MEMORY_S = 20.0
"""Time that has passed counts the less the longer ago it was: to a third after so many busy seconds."""


class Share:
    """Keeps learning's part of the time in which others waited below ``limit``."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._learning_s = 0.0
        self._total_s = 0.0

    @property
    def is_open(self) -> bool:
        """Whether learning may have a part in the next pass although others wait."""
        return self._learning_s <= self._limit * self._total_s

    def spend(self, duration_s: float, learning: float) -> None:
        """A pass took ``duration_s`` while others waited; ``learning`` of it, 0 to 1, was for learning."""
        kept = max(0.0, 1 - duration_s / MEMORY_S)
        self._learning_s = kept * self._learning_s + learning * duration_s
        self._total_s = kept * self._total_s + duration_s
