"""What the server knows of an edit method before it runs one. Imports nothing heavy: every process reads it.

A method is a folder under ``methods`` that is named like the method, with these files:

``options.py``
    its options, a frozen :class:`~underpaint_server.jobs.EditOptions`, and ``METHOD``, a :class:`Method`.
``steps.py``
    the paper as a generator of rows: ``edit(task)``, and ``invert(task)`` where the folder has an inversion too.
``prepare.py``
    ``PREPARATION``: what its task needs beforehand. A method that needs nothing has no such file.
``wire.py``
    ``MESSAGE``: how its message in an EditRequest is read and written; ``INVERSION``, likewise for an inversion's.

Only ``options.py`` is imported by the table. The other files are loaded by name when they are first used, because the
server's process must not load torch and the engine's process has no use for protobuf.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

from underpaint_server.jobs import EditJob, EditOptions, InversionMethod
from underpaint_server.methods.cost import Plan

Options = TypeVar("Options", bound=EditOptions)


def no_cost(_job: EditJob) -> Plan:
    """No network rows."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(Generic[Options]):
    """One edit method."""

    options: type[Options]
    cost: Callable[[EditJob], Plan]
    """Network rows of the edit itself."""
    preparation_cost: Callable[[EditJob], Plan] = no_cost
    """Network rows of what ``prepare.py`` asks before the edit."""
    mask_cost: Callable[[Options], Plan] | None = None
    """Network rows of computing a mask alone; None where the method computes none."""
    inversion: type[InversionMethod] | None = None
    """The inversion that the edit starts from; None where the source is not inverted."""
    starts_from_noise: bool = True
    """Whether editing a generated source starts from the noise that the source is drawn from. If not, the source is
    drawn first, and then inverted where the method has an inversion."""
    exact: bool = False
    """Whether the edit must repeat the network's answers of the inversion bit for bit."""
    needs_text: bool = False
    """Whether it makes no sense for a model without a text encoder."""

    @property
    def name(self) -> str:
        """See :class:`~underpaint_server.jobs.EditOptions`."""
        return self.options.name


@cache
def part(name: str, file: str) -> Any:
    """The module ``file`` of the folder ``name``, loaded when it is first asked for; None if there is no such file."""
    module = f"{__package__}.{name}.{file}"
    return import_module(module) if find_spec(module) is not None else None
