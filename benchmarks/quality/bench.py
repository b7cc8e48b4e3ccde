"""What all methods are measured with: a server with the models to compare, the cases, and a judge."""

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
"""Requests at the same time; changes the duration of the run, not its figures."""
UNCONDITIONAL = "unconditional"
"""Model id of the DDPM on the server, which takes no text."""
SHOWN = 4
"""Cases of each kind on a contact sheet."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Server, cases and settings of one run, the same for all methods."""

    client: Client
    locations: dict[str, Path]
    """Model id on the server -> its pipeline directory."""
    dtype: str
    cases: list[Case]
    judge: Judge
    steps: int
    """num_inference_steps of an edit."""
    mask_samples: int
    """Noise samples of a DiffEdit mask."""
    quick: bool
    memory: dict[str, Any] = field(default_factory=dict)
    """Results of one method that another one reports too."""

    @property
    def models(self) -> tuple[str, ...]:
        """Ids of the models compared, in the order of the command line."""
        return tuple(self.locations)

    @property
    def counts(self) -> dict[str, int]:
        """Numbers for the sections' introductions."""
        count = len(self.cases)
        return {"steps": self.steps, "samples": self.mask_samples, "count": count, "each": count // len(KINDS)}

    @property
    def shown(self) -> list[Case]:
        """The cases on contact sheets: the first :data:`SHOWN` of each kind."""
        return [case for kind in KINDS for case in [c for c in self.cases if c.kind == kind][:SHOWN]]

    def each(self, what: str, ask: Callable[[str, Case], T]) -> list[T]:
        """``ask(model, case)`` for every model and case, several at a time; results model by model."""
        pairs = [(model, case) for model in self.models for case in self.cases]
        return self.all_of(what, pairs, lambda pair: ask(*pair))

    def all_of(self, what: str, items: Sequence[S], ask: Callable[[S], T]) -> list[T]:
        """``ask(item)`` for every item, several at a time; results in the items' order.

        ``what`` labels the progress bar.
        """
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
