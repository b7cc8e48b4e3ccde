"""Progress of a call: passed to the caller's function, or drawn as a bar on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

from underpaint.results import Phase, Progress

F = TypeVar("F", bound=Callable[[Progress], Any])


@contextmanager
def listening(progress: bool | F | None) -> Iterator[F | Callable[[Progress], Any] | None]:
    """The callback for the duration of a call: the given function, a bar for True, else None."""
    if progress is True:
        with _rich() as drawing:
            yield Bar(drawing)
    else:
        yield progress or None


class Bar:
    """Draws phase, share of the whole request, steps of the phase and time left."""

    def __init__(self, drawing: "RichProgress") -> None:
        self._drawing = drawing
        self._task = drawing.add_task("connecting", total=1.0, detail="", eta="")

    def __call__(self, progress: Progress) -> None:
        self._drawing.update(
            self._task,
            completed=progress.fraction,
            description=str(progress.phase),
            detail=_detail(progress),
            eta="" if progress.eta_s is None else f"{progress.eta_s:.1f} s left",
        )


class Counter:
    """Counts the pictures of a folder, and says what failed: above a bar where one is drawn, else by ``say``."""

    def __init__(self, total: int, say: Callable[[str], None], drawing: "RichProgress | None") -> None:
        self._total = total
        self._say = say
        self._drawing = drawing
        self._task = None if drawing is None else drawing.add_task("editing", total=total, detail="", eta="")
        self._done = self._failed = 0

    def done(self) -> None:
        """One more is edited."""
        self._done += 1
        self._draw()

    def failed(self, text: str) -> None:
        """One more has failed; ``text`` says which and why."""
        self._failed += 1
        if self._drawing is None:
            self._say(text)
        else:
            self._drawing.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._draw()

    def _draw(self) -> None:
        if self._drawing is None or self._task is None:
            return
        finished = self._done + self._failed
        left_s = (self._total - finished) * (self._drawing.tasks[0].elapsed or 0.0) / finished
        failed = f", {self._failed} failed" if self._failed else ""
        self._drawing.update(
            self._task, completed=finished, detail=f"{finished}/{self._total}{failed}", eta=f"{left_s:.0f} s left"
        )


@contextmanager
def counting(total: int, say: Callable[[str], None], draw: bool) -> Iterator[Counter]:
    """A counter for the duration of the work on a folder."""
    if not draw:
        yield Counter(total, say, None)
        return
    with _rich() as drawing:
        yield Counter(total, say, drawing)


def _detail(progress: Progress) -> str:
    if progress.phase is Phase.QUEUED:
        return f"position {progress.queue_position}" if progress.queue_position else ""
    return f"{progress.step}/{progress.total_steps}" if progress.total_steps else ""


def _rich() -> "RichProgress":
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[detail]}"),
        TextColumn("{task.fields[eta]}"),
    )
    # No bar where stderr is a log file; a notebook is no terminal, but rich can draw there. Quiet, too, because rich
    # before 15 ends even a disabled bar with a newline.
    console.quiet = not (console.is_terminal or console.is_jupyter)
    return RichProgress(*columns, console=console, transient=True, disable=console.quiet)
