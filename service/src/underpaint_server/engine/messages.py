"""What the front process and the engine process tell each other."""

from collections.abc import Mapping
from dataclasses import dataclass

from underpaint_server.errors import UnderpaintError
from underpaint_server.jobs import Job, ModelInfo, Preview, Priority, Progress, Result

# --- front to engine ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartJob:
    """Run a job. ``deadline`` and ``submitted`` are readings of ``time.monotonic``, one clock for both processes."""

    id: int
    job: Job
    priority: Priority
    submitted: float
    deadline: float | None
    preview_every: int


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Drop a job; its rows are gone before the next pass."""

    id: int


@dataclass(frozen=True, slots=True)
class ExtendJob:
    """Somebody who can wait longer waits for this job too; None is no deadline."""

    id: int
    deadline: float | None


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the loop."""


Order = StartJob | CancelJob | ExtendJob | Stop

# --- engine to front ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """All models are in memory, in the configured order; seconds each took."""

    models: tuple[tuple[ModelInfo, float], ...]


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A model cannot be served; the process ends."""

    error: UnderpaintError


@dataclass(frozen=True, slots=True)
class Passed:
    """One forward pass was made."""

    model: str
    kind: str
    """Of its rows, in small letters: denoise, encode, decode, embed, pullback, ..."""
    is_network: bool
    """Whether its rows are network rows, see :func:`underpaint_server.rows.is_network_row`."""
    rows_by_method: Mapping[str, int]
    padding: int
    duration_s: float
    memory_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Split:
    """A batch came out smaller than it could have been: ``oom`` or ``error``."""

    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Advanced:
    """A job got further, by ``rows`` network rows in all."""

    id: int
    progress: Progress
    rows: int


@dataclass(frozen=True, slots=True)
class Previewed:
    """A look at a job's present guess."""

    id: int
    preview: Preview


@dataclass(frozen=True, slots=True)
class Ended:
    """A job is over and holds nothing any more. A cancelled one ends with :class:`Cancelled`."""

    id: int
    outcome: Result | UnderpaintError


Report = Ready | LoadFailed | Passed | Split | Advanced | Previewed | Ended
