"""Chooses the waiting rows that share the next forward pass: one pure function of keys and numbers, without a clock.

The most urgent row decides the key; rows with that key join in order of urgency, up to the cap. Urgency is: higher
priority first, then rows of other kinds before network rows (they are short, and start or end a job), then
the job whose last pass is longest ago. So a job waits for at most one round of the other jobs of its priority.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from underpaint_server.rows import Key, is_network_row


@dataclass(frozen=True, slots=True)
class WaitingRow:
    """A row that has no answer yet."""

    job: int
    """Id of its job."""
    index: int
    """Position in the job's current group."""
    key: Key
    priority: int
    """Larger is more urgent, see :class:`underpaint_server.jobs.Priority`."""
    served: int
    """Number of the last pass that had a row of the job; 0 before the first."""
    name: Hashable = None
    """See :func:`underpaint_server.rows.named`; None for a row without a name."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows that share the next forward pass."""

    rows: tuple[WaitingRow, ...]
    size: int
    """Rows of the pass, padding included."""


def choose(rows: Sequence[WaitingRow], cap: Callable[[Key], int], minimum: Callable[[Key], int]) -> Selection | None:
    """The next pass, or None if no row waits.

    ``cap`` and ``minimum`` give the most and the fewest rows of a pass with that key. A key with a batch class gets a
    pass of exactly that many rows.
    """
    if not rows:
        return None
    ordered = sorted(rows, key=_urgency)
    key = ordered[0].key
    members = [row for row in ordered if row.key == key]
    if key.batch_class is not None:
        return Selection(tuple(members[: key.batch_class]), key.batch_class)
    members = members[: cap(key)]
    return Selection(tuple(members), max(len(members), minimum(key)))


def _urgency(row: WaitingRow) -> tuple[int, bool, int, int, int]:
    return (-row.priority, is_network_row(row.key.kind), row.served, row.job, row.index)
