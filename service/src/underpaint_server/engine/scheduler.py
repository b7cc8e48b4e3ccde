"""Which waiting rows share the next forward pass. Plain Python on keys and numbers; knows no tensor and no clock.

The most urgent row chooses the key; then every waiting row of that key rides along, most urgent first, up to the cap.
Urgent means: higher priority, then an encoder or decoder before the network (it is short, and starts or ends a job),
then the job served longest ago. So nobody of a priority waits more than one round for the others of that priority.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from underpaint_server.rows import Denoise, Key


@dataclass(frozen=True, slots=True)
class WaitingRow:
    """One waiting row."""

    job: int
    index: int
    """Position in its group."""
    key: Key
    priority: int
    served: int
    """Number of the pass the job last had a part in."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows that share the next forward pass."""

    rows: tuple[WaitingRow, ...]
    size: int
    """Rows of the pass, padding counted."""


def choose(rows: Sequence[WaitingRow], cap: Callable[[Key], int], minimum: Callable[[Key], int]) -> Selection | None:
    """The next pass, or None when nothing waits.

    A key with a batch class gets a pass of exactly that many rows. Places it cannot fill itself go to rows of the same
    shape without a class, which may run at any size.
    """
    if not rows:
        return None
    ordered = sorted(rows, key=_urgency)
    key = ordered[0].key
    riders = [row for row in ordered if row.key == key]
    if key.batch_class is None:
        taken = riders[: cap(key)]
        return Selection(tuple(taken), max(len(taken), minimum(key)))
    free = replace(key, batch_class=None)
    riders += [row for row in ordered if row.key == free]
    return Selection(tuple(riders[: key.batch_class]), key.batch_class)


def _urgency(row: WaitingRow) -> tuple[int, bool, int, int, int]:
    return (-row.priority, row.key.kind is Denoise, row.served, row.job, row.index)
