"""What the commands share that try a model without serving it: the engine in this process, and what people are told.

Facts go to stdout, progress and errors to stderr.
"""

import queue
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from underpaint_server.backends.protocol import Backend, DeviceLost
from underpaint_server.engine.loop import Engine
from underpaint_server.engine.messages import Ended, Order, Passed, Report, StartJob, Stop
from underpaint_server.engine.run import now
from underpaint_server.errors import Bug, UnderpaintError, cause_of
from underpaint_server.jobs import Exactness, Inversion, Inverted, Job, Picture, Priority
from underpaint_server.plans import total_rows
from underpaint_server.settings import Settings
from underpaint_server.telemetry import configure_logging

LINE_EVERY_S = 10.0
"""Shortest time between two lines of progress where stderr is not a terminal, in seconds."""
EXACT = 1e-8
"""Largest latent error of a round trip that counts as exact."""
PASSES = {
    Exactness.ANY_SIZE: "of any size, which does not change a bit",
    Exactness.ROW_BY_ROW: "of any size, each row computed by itself",
    Exactness.FIXED_SIZE: "of {} rows",
    Exactness.INEXACT: "without equal bits for equal rows",
}
"""What is said of the passes; a fixed number of rows is put in."""


def status(settings: Settings, work: Callable[[], int]) -> int:
    """Do the work of a command; returns its exit status, or 1 after an error, which is printed."""
    configure_logging(settings.log_level)
    structlog.configure(
        processors=[structlog.processors.format_exc_info, _as_note],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    try:
        return work()
    except UnderpaintError as error:
        return _refuse(error)
    except DeviceLost as error:
        return _refuse(Bug(f"the device failed and needs a new process: {error}"))
    except Exception as error:
        return _refuse(Bug(f"{type(error).__name__}: {error}"))


# --- the engine -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Collector:
    """Collects the engine's reports and stops the engine when all jobs have ended."""

    jobs: int
    inbox: "queue.SimpleQueue[Order]"
    advance: Callable[[int], None]
    outcomes: dict[int, Any]
    passes: list[Passed]

    def __call__(self, report: Report) -> None:
        if isinstance(report, Passed) and report.is_network:
            self.passes.append(report)
            self.advance(sum(report.rows_by_method.values()))
        if isinstance(report, Ended):
            self.outcomes[report.id] = report.outcome
            if len(self.outcomes) == self.jobs:
                self.inbox.put(Stop())


def run(
    backend: Backend, settings: Settings, jobs: Sequence[Job], caption: str
) -> tuple[list[Inversion], list[Passed]]:
    """Run inversion jobs at the same time; their inversions, in the order of the jobs, and the network passes.

    Raises the error of the first job that failed. ``caption`` labels the progress bar.
    """
    inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
    for id_, job in enumerate(jobs):
        inbox.put(StartJob(id_, job, Priority.NORMAL, now(), None, 0))
    with progress(caption, sum(total_rows(job) for job in jobs)) as advance:
        collector = _Collector(len(jobs), inbox, advance, {}, [])
        Engine({backend.facts.info.id: backend}, inbox, collector, settings.max_batch_size, settings.learn_share).run()
    outcomes = [collector.outcomes[id_] for id_ in range(len(jobs))]
    for outcome in outcomes:
        if isinstance(outcome, UnderpaintError):
            raise outcome
    inversions = [outcome.inversion for outcome in outcomes if isinstance(outcome, Inverted)]
    return inversions, collector.passes


# --- test image and output --------------------------------------------------------------------------------------


def ball(width: int, height: int) -> Picture:
    """The test image, (height, width, 3): a lit ball on a table, with smooth shading, a sharp edge, a soft shadow."""
    y, x = np.mgrid[:height, :width] + 0.5
    side, floor = min(width, height), 0.62 * height
    wall = np.array([0.62, 0.70, 0.80]) * (0.7 + 0.3 * y / height)[..., None]
    table = np.array([0.55, 0.38, 0.24]) * (0.6 + 0.5 * (y - floor) / (height - floor))[..., None]
    scene = np.where((y > floor)[..., None], table, wall)
    across, down = (x - 0.5 * width) / (0.27 * side), (y - 0.55 * height) / (0.27 * side)
    shadow = np.exp(-2.5 * (((across - 0.35) / 1.2) ** 2 + ((down - 0.95) / 0.35) ** 2))
    scene = scene * (1 - 0.6 * shadow * (y > floor))[..., None]
    depth = np.sqrt(np.clip(1 - across**2 - down**2, 0, None))
    light = np.clip(-0.5 * across - 0.6 * down + 0.62 * depth, 0, None)
    lit = np.array([0.85, 0.25, 0.2]) * (0.15 + 0.85 * light)[..., None] + (0.6 * light**40)[..., None]
    scene = np.where((depth > 0)[..., None], lit, scene)
    pixels: Picture = (255 * scene.clip(0, 1)).round().astype(np.uint8)
    return pixels


@contextmanager
def progress(caption: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of ``total`` rows are done; the function that is yielded is told of each pass's rows.

    A terminal gets a bar, anything else a line at the start and then at most one every :data:`LINE_EVERY_S`.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(caption, total=total)
            yield lambda rows: bar.advance(task, rows)
        return
    print_note(f"{caption}: {total} rows")
    begin = last_line = now()
    done = 0

    def advance(rows: int) -> None:
        nonlocal done, last_line
        done += rows
        if now() - last_line >= LINE_EVERY_S and done < total:
            last_line = now()
            print_note(f"{caption}: {done} of {total} rows after {seconds(last_line - begin)}")

    yield advance


def print_fact(label: str, value: str) -> None:
    """Print what was found."""
    print(f"{label:<15} {value}", flush=True)


def _as_note(_logger: object, _level: str, line: MutableMapping[str, Any]) -> str:
    """A log line as a note for people."""
    parts = [line.get("note") or line["event"], line.get("error"), line.get("exception")]
    return "underpaint-server: " + "\n".join(str(part) for part in parts if part)


def print_note(line: str) -> None:
    """Print what goes on, or what is wrong."""
    print(f"underpaint-server: {line}", file=sys.stderr, flush=True)


def _refuse(error: UnderpaintError) -> int:
    print_note(f"{error.reason}: {error.message}")
    if cause := cause_of(error):
        print_note(f"cause: {cause}")
    print_note("this model cannot be served; the README lists under 'Your own weights' which models can")
    return 1


def seconds(value: float) -> str:
    """A time for people."""
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"
