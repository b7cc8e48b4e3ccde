"""Chooses the waiting rows that share the next forward pass: one pure function of keys and numbers, without a clock.

Every pass is one priority's turn (see :mod:`underpaint_server.engine.share`). Of that priority, the most urgent row
decides the key: that of the job whose virtual deadline is earliest, see :mod:`underpaint_server.dispatch.due`.
Rows with that key join in order of urgency, up to the cap. Network rows give way to rows of other kinds, which begin
and end jobs, where these fill a pass of their own, or where the network's pass would be less full than :data:`ENOUGH`
and the jobs behind them may fill it. Otherwise they wait for more of their kind, until they are the most urgent. Rows
of other priorities take no places but those that would be padding: in a larger pass, all wait longer.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from underpaint_server.rows import Key, is_network_row

ENOUGH = 0.75
"""Share of a network pass from which on it need not wait to be filled."""


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
    due: float
    """Virtual deadline of the job; earlier is more urgent among rows of one priority."""
    name: Hashable = None
    """See :func:`underpaint_server.rows.named`; None for a row without a name."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows that share the next forward pass."""

    rows: tuple[WaitingRow, ...]
    size: int
    """Rows of the pass, padding included."""


def choose(
    rows: Sequence[WaitingRow], turn: int, cap: Callable[[Key], int], minimum: Callable[[Key], int]
) -> Selection:
    """The next pass, for the priority ``turn``, of which at least one row waits.

    ``cap`` and ``minimum`` give the most and the fewest rows of a pass with that key. A key with a batch class gets a
    pass of exactly that many rows.
    """
    ordered = sorted(rows, key=lambda row: (row.priority != turn, -row.priority, row.due, row.job, row.index))
    own = Counter(row.key for row in ordered if row.priority == turn)
    key = _key(own, cap)
    size = key.batch_class or max(minimum(key), min(own[key], cap(key)))
    return Selection(tuple(row for row in ordered if row.key == key)[:size], size)


def _key(own: Mapping[Key, int], cap: Callable[[Key], int]) -> Key:
    """The key of the next pass; ``own`` are the numbers of waiting rows, the most urgent key first."""
    first = next(iter(own))
    if not is_network_row(first.kind):
        return first
    has_room = own[first] < ENOUGH * _room(first, cap)
    sides = (key for key in own if not is_network_row(key.kind))
    return next((key for key in sides if has_room or own[key] >= _room(key, cap)), first)


def _room(key: Key, cap: Callable[[Key], int]) -> int:
    return key.batch_class or cap(key)
