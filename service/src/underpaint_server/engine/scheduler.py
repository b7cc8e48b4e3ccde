"""Which waiting rows share the next forward pass. Plain Python on keys and numbers; knows no tensor and no clock.

The most urgent row chooses the key; then every waiting row of that key rides along, most urgent first, up to the cap.
Urgent means: higher priority, then an encoder or decoder before the network (it is short, and starts or ends a job),
then the job served longest ago. So nobody of a priority waits more than one round for the others of that priority.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from underpaint_server.rows import Denoise, Key


@dataclass(frozen=True, slots=True)
class Ticket:
    """One waiting row."""

    job: int
    index: int
    """Position in its group."""
    key: Key
    priority: int
    served: int
    """Number of the pass the job last had a part in."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows that share the next forward pass."""

    tickets: tuple[Ticket, ...]
    size: int
    """Rows of the pass, padding counted."""


def choose(tickets: Sequence[Ticket], cap: Callable[[Key], int], minimum: Callable[[Key], int]) -> Pass | None:
    """The next pass, or None when nothing waits.

    A key with a batch class gets a pass of exactly that many rows. Places it cannot fill itself go to rows of the same
    shape without a class, which may run at any size.
    """
    if not tickets:
        return None
    ordered = sorted(tickets, key=_urgency)
    key = ordered[0].key
    riders = [ticket for ticket in ordered if ticket.key == key]
    if key.batch_class is None:
        taken = riders[: cap(key)]
        return Pass(tuple(taken), max(len(taken), minimum(key)))
    free = replace(key, batch_class=None)
    riders += [ticket for ticket in ordered if ticket.key == free]
    return Pass(tuple(riders[: key.batch_class]), key.batch_class)


def _urgency(ticket: Ticket) -> tuple[int, bool, int, int, int]:
    return (-ticket.priority, ticket.key.kind is Denoise, ticket.served, ticket.job, ticket.index)
