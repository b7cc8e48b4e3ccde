"""Whose turn a pass is: the highest priority's, but for a small share of those below. Works on durations; no clock."""

from collections.abc import Collection

from underpaint_server.jobs import Priority

MEMORY_S = 20.0
"""Time constant of the decaying sums, in busy seconds: device time this long ago counts about a third (1/e)."""
LOWER_SHARE = 0.05
"""Share of the device time that NORMAL and BATCH jobs get, each, while jobs of higher priorities wait."""


class Share:
    """Keeps one priority's share of the device time at ``limit``, (0, 1], while higher ones wait."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._own_s = 0.0
        self._total_s = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the next pass may be this priority's although higher ones wait."""
        return self._own_s < self._limit * self._total_s

    def spend(self, duration_s: float, *, own: bool) -> None:
        """Count a pass of ``duration_s`` seconds; ``own``: it was this priority's turn.

        To be called only for passes while jobs of this priority and of higher ones are present.
        """
        kept = max(0.0, 1 - duration_s / MEMORY_S)
        self._own_s = kept * self._own_s + own * duration_s
        self._total_s = kept * self._total_s + duration_s


class Turns:
    """Divides the passes among priorities.

    The highest one that waits has the turn, except while a lower one has had less than its share of the time in which
    both were there: so what is low still moves, and no flood of it can delay what is high by more than these shares.
    ``learn_share``, (0, 1], is the share of LEARNING, ``lower_share`` that of BATCH and that of NORMAL.
    """

    def __init__(self, learn_share: float, lower_share: float = LOWER_SHARE) -> None:
        self._shares = {
            Priority.LEARNING: Share(learn_share),
            Priority.BATCH: Share(lower_share),
            Priority.NORMAL: Share(lower_share),
        }

    def next(self, waiting: Collection[int]) -> int:
        """The priority whose rows the next pass is for; ``waiting`` are those that have rows."""
        highest = max(waiting)
        open_ = (p for p, share in self._shares.items() if p in waiting and p < highest and share.is_open)
        return next(open_, highest)

    def spend(self, duration_s: float, turn: int, present: Collection[int]) -> None:
        """Count a pass that was the turn of one priority; ``present`` are the priorities of all jobs."""
        for priority, share in self._shares.items():
            if priority in present and priority < max(present):
                share.spend(duration_s, own=priority == turn)
