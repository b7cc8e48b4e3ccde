"""What every method is measured with: a server of the models to compare, the cases, a judge."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from underpaint import Client

from benchmarks.cases import KINDS, Case
from benchmarks.quality.judge import Judge
from benchmarks.report import console

S = TypeVar("S")
T = TypeVar("T")
BESIDE = 8
"""Requests at one time: it changes the time this takes, not the answers."""
UNCONDITIONAL = "unconditional"
"""Id of the DDPM on the server, which reads no text."""
SHOWN = 4
"""Cases of each kind on a contact sheet."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Shared by all methods of one run."""

    client: Client
    places: dict[str, Path]
    """Model id on the server -> its pipeline directory."""
    dtype: str
    cases: list[Case]
    judge: Judge
    steps: int
    """Of the schedule of an edit."""
    mask_samples: int
    """Of DiffEdit's masks."""
    quick: bool
    memory: dict[str, Any] = field(default_factory=dict)
    """What one method made and another wants to show too."""

    @property
    def models(self) -> tuple[str, ...]:
        """Ids of the models compared, in the order they were named."""
        return tuple(self.places)

    @property
    def counts(self) -> dict[str, int]:
        """What the sections' introductions state."""
        count = len(self.cases)
        return {"steps": self.steps, "samples": self.mask_samples, "count": count, "each": count // len(KINDS)}

    @property
    def shown(self) -> list[Case]:
        """The cases that contact sheets hold: the first few of each kind."""
        return [case for kind in KINDS for case in [c for c in self.cases if c.kind == kind][:SHOWN]]

    def each(self, what: str, ask: Callable[[str, Case], T]) -> list[T]:
        """``ask(model, case)`` for every model and case; answers in that order."""
        pairs = [(model, case) for model in self.models for case in self.cases]
        return self.all_of(what, pairs, lambda pair: ask(*pair))

    def all_of(self, what: str, items: Sequence[S], ask: Callable[[S], T]) -> list[T]:
        """``ask`` of every item, several at a time, with a bar; answers in the items' order."""
        with bar() as drawn, ThreadPoolExecutor(BESIDE) as threads:
            task = drawn.add_task(what, total=len(items))

            def one(item: S) -> T:
                answer = ask(item)
                drawn.advance(task)
                return answer

            return list(threads.map(one, items))


def bar() -> Progress:
    """A progress bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
