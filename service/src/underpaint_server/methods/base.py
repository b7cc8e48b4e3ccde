"""What every process knows about an edit method. This module and ``options.py`` import neither torch nor protobuf.

A method is a folder under ``methods`` that is named like the method, with these files:

``options.py`` its options, a frozen :class:`~underpaint_server.jobs.EditOptions`, and ``METHOD``, a :class:`Method`.
``steps.py`` the method as a generator of rows: ``edit(task)``, and ``invert(task)`` where the folder has an inversion
too. ``prepare.py`` ``PREPARATION``: how its task is made (see ``methods.task``). A method whose task is the default one
has no such file. ``wire.py`` ``MESSAGE``: how its message in an EditRequest is read and written; ``INVERSION`` likewise
for its message in InversionParameters (see ``methods.message``).

The table of methods imports only ``options.py``. The other files are imported by name when they are first used, because
the front process must not load torch and the engine process does not need protobuf.
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
    """The empty plan: no network rows."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(Generic[Options]):
    """Properties of one edit method."""

    options: type[Options]
    """Class of its options."""
    cost: Callable[[EditJob], Plan]
    """Plan of the edit itself, without inverting or generating the source."""
    preparation_cost: Callable[[EditJob], Plan] = no_cost
    """Plan of the rows that ``prepare.py`` yields before the edit."""
    mask_cost: Callable[[Options], Plan] | None = None
    """Plan of computing only the mask; None where the method computes none."""
    inversion: type[InversionMethod] | None = None
    """The inversion that the edit starts from; None where the source is not inverted."""
    starts_from_noise: bool = True
    """Whether an edit of a generated source starts from the noise of that source. If not, the source is generated
    first, and then inverted where the method has an inversion."""
    needs_text: bool = False
    """Whether it can run only on a model with a text encoder."""

    @property
    def name(self) -> str:
        """See :class:`~underpaint_server.jobs.EditOptions`."""
        return self.options.name


@cache
def part(name: str, file: str) -> Any:
    """The module ``file`` of the folder ``name``, imported at the first call; None if there is no such file."""
    module = f"{__package__}.{name}.{file}"
    return import_module(module) if find_spec(module) is not None else None
