"""The order among jobs of one priority: earliest virtual deadline first.

A job's virtual deadline is set once, when it is admitted, from what it costs. A short job goes before a longer one that
waits, but only for a time in proportion to the longer one's cost: every job becomes the first of its priority in the
end, without anybody looking at a clock again.
"""

from typing import Final

SLACK: Final = 3.0
"""How many times its own cost a job may wait before it goes first, of those of its priority."""


def due(submitted: float, cost_s: float, deadline: float | None) -> float:
    """Virtual deadline (monotonic) of a job that was admitted at ``submitted`` and needs about ``cost_s`` seconds of
    device time; never later than its caller's own deadline, None for none."""
    virtual = submitted + SLACK * cost_s
    return virtual if deadline is None else min(virtual, deadline)
