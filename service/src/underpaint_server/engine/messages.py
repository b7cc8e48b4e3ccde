"""Messages between the front process and the engine process: orders one way, reports the other. All are picklable."""

from collections.abc import Mapping
from dataclasses import dataclass

from underpaint_server.errors import UnderpaintError
from underpaint_server.jobs import Job, ModelInfo, Preview, Priority, Progress, Result

# --- front to engine ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """Load the configured models and serve them: the first order that a process gets, and only once."""


@dataclass(frozen=True, slots=True)
class StartJob:
    """Run a job. Times are readings of ``time.monotonic``, which both processes share."""

    id: int
    job: Job
    priority: Priority
    submitted: float
    deadline: float | None
    """None for no deadline."""
    preview_every: int
    """Denoising steps from one preview to the next; 0 for no previews."""
    due: float = 0.0
    """Virtual deadline, see :mod:`underpaint_server.dispatch.due`; among jobs of one priority, those with earlier
    ones go first."""


@dataclass(frozen=True, slots=True)
class CancelJob:
    """End a job; the next pass no longer contains its rows."""

    id: int


@dataclass(frozen=True, slots=True)
class ExtendJob:
    """Move a job's deadline: another caller, with more time, waits for the same job."""

    id: int
    deadline: float | None
    """The later deadline, a reading of ``time.monotonic``; None for no deadline."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the loop; jobs that run get no result."""


Order = Load | StartJob | CancelJob | ExtendJob | Stop

# --- engine to front ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """At least one model is loaded."""

    models: tuple[tuple[ModelInfo, float], ...]
    """Each loaded model and the seconds that loading it took, in the configured order."""
    failed: Mapping[str, UnderpaintError]
    """Id of each model that cannot be served -> why."""


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """No model can be served; the process ends."""

    errors: Mapping[str, UnderpaintError]
    """Id of each model -> why."""


@dataclass(frozen=True, slots=True)
class Passing:
    """A forward pass begins; :class:`Passed` follows it, or another one if it is split."""

    model: str
    kind: str
    """As in :class:`Passed`."""
    shape: tuple[int, ...]
    """Of the rows, see :class:`underpaint_server.rows.Key`."""
    rows: int
    """Of the pass, padding included; at least 1."""


@dataclass(frozen=True, slots=True)
class Passed:
    """One forward pass ended."""

    model: str
    kind: str
    """Class of its rows in lower case: denoise, pullback, encode, decode, pullbackdecode, score, embed."""
    is_network: bool
    """Whether its rows are network rows, see :func:`underpaint_server.rows.is_network_row`."""
    rows_by_method: Mapping[str, int]
    """Method -> rows of its jobs; padding is not counted."""
    padding: int
    """Rows that belong to no job and only fill the pass."""
    duration_s: float
    cpu_s: float
    """CPU seconds of all threads of the process."""
    memory_bytes: Mapping[str, int]
    """Device memory by kind, see :meth:`underpaint_server.backends.protocol.Backend.memory_bytes`."""
    pixels: int
    """Pixels of the image of one network row; 0 for other rows."""


@dataclass(frozen=True, slots=True)
class Reused:
    """Rows of jobs that were not computed, because another row with the same name was."""

    model: str
    kind: str
    """As in :class:`Passed`."""
    rows: int


@dataclass(frozen=True, slots=True)
class Capped:
    """The most rows of a pass of network rows, as far as it is learned; see :mod:`underpaint_server.engine.caps`."""

    model: str
    kind: str
    """As in :class:`Passed`."""
    pixels: int
    """Pixels of the image of one row."""
    rows: int


@dataclass(frozen=True, slots=True)
class Split:
    """A pass failed and was replaced by smaller ones."""

    model: str
    reason: str
    """``oom``: out of device memory; ``error``: any other exception."""


@dataclass(frozen=True, slots=True)
class Advanced:
    """A job's progress."""

    id: int
    progress: Progress
    rows: int
    """Network rows of the job that are done."""


@dataclass(frozen=True, slots=True)
class Previewed:
    """A preview of a job: its current prediction of the final image."""

    id: int
    preview: Preview


@dataclass(frozen=True, slots=True)
class Ended:
    """A job ended and its memory is free. A cancelled job ends with :class:`Cancelled`."""

    id: int
    outcome: Result | UnderpaintError


Report = Ready | LoadFailed | Passing | Passed | Reused | Capped | Split | Advanced | Previewed | Ended
