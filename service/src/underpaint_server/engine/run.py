"""One job inside the engine: its generator, the group of rows it waits for, and its progress and usage."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from underpaint_server.backends.protocol import Backend
from underpaint_server.diffusion.ddim import pred_x0
from underpaint_server.engine.messages import StartJob
from underpaint_server.engine.reuse import Name
from underpaint_server.engine.scheduler import WaitingRow
from underpaint_server.jobs import (
    EditJob,
    Inversion,
    InvertJob,
    Job,
    MaskJob,
    Phase,
    Progress,
    Result,
    Stored,
    Usage,
)
from underpaint_server.methods import job_name
from underpaint_server.methods.cost import Stage
from underpaint_server.plans import plan
from underpaint_server.programs import program
from underpaint_server.rows import Captured, Decode, Denoise, Encode, Key, PullBack, PullBackDecode, Row, Score

PROGRESS_EVERY_S = 0.05
"""Shortest time between two progress reports of a job, in seconds."""


class JobRun:
    """Runs a job's generator: offers the rows it waits for and sends it their answers."""

    def __init__(self, start: StartJob, backend: Backend) -> None:
        """Run the generator up to its first group of rows; raises whatever the generator raises."""
        self.start = start
        self.deadline = start.deadline
        self.method = job_name(start.job)
        self.result: Result | None = None
        self.progress = ProgressCounter(start, plan(start.job))
        self._backend = backend
        self._batch_class = _stored_batch_class(start.job)
        self._generator = program(start.job, backend.facts)
        self._group: Sequence[Row] = next(self._generator)
        self._answers: dict[int, Any] = {}
        self.is_new_group = True
        """Whether nobody has looked yet for known answers to the current group."""
        self.names: set[Name] = set()
        """Of the kept answers that the job has used or given."""
        self._denoised: tuple[Denoise, Any] | None = None

    def waiting_rows(self) -> Iterator[WaitingRow]:
        """The rows of the current group that have no answer yet."""
        for index, row in enumerate(self._group):
            if index not in self._answers:
                name = getattr(row, "name", None)
                yield WaitingRow(self.start.id, index, self._key(row), self.start.priority, self.start.due, name)

    def row(self, index: int) -> Row:
        """The row at ``index`` of the current group."""
        return self._group[index]

    def answer(self, index: int, value: Any) -> bool:
        """Store the answer to row ``index``; True if it completed the group and the generator went on.

        When the generator ends, ``result`` is set. Raises whatever the generator raises.
        """
        self._answers[index] = value
        if len(self._answers) < len(self._group):
            return False
        answers = [self._answers[i] for i in range(len(self._group))]
        if self.start.preview_every > 0 and isinstance(row := self._group[-1], Denoise):
            self._denoised = row, answers[-1]
        self._answers, self.is_new_group = {}, True
        try:
            self._group = self._generator.send(answers)
        except StopIteration as end:
            self._group, self.result = (), end.value
        return True

    def take_preview(self) -> Decode | None:
        """The row that decodes the current prediction of x_0, if a preview is due; at most once a step, else None."""
        every, step = self.start.preview_every, self.progress.step
        due = every > 0 and step > 0 and step % every == 0 and self.progress.phase is Phase.DENOISING
        denoised, self._denoised = self._denoised, None
        if not self.progress.is_new_step() or not due or denoised is None:
            return None
        row, answer = denoised
        noise_pred = answer.noise_pred if isinstance(answer, Captured) else answer
        return Decode(pred_x0(row.latents, noise_pred, row.alpha_bar))

    def close(self) -> None:
        """Close the generator and drop its rows."""
        self._group = ()
        self._generator.close()

    def _key(self, row: Row) -> Key:
        kind = type(row)
        match row:
            case Encode(image=image) | Score(image=image):
                shape = tuple(image.shape)
            case Denoise(latents=latents) | PullBack(latents=latents):
                shape = tuple(latents.shape)
            case Decode(latents=latents) | PullBackDecode(latents=latents):
                shape = tuple(latents.shape)
            case _:
                shape = ()
        stored = self._batch_class if kind is Denoise else None
        return Key(self.start.job.model, kind, shape, stored or self._backend.batch_class(kind, shape))


class ProgressCounter:
    """Counts a job's network rows against its plan and derives progress, phases and usage from the count."""

    def __init__(self, start: StartJob, stages: tuple[Stage, ...]) -> None:
        self.rows = 0
        """Network rows that were answered."""
        self.reused = 0
        """Those of them that were not computed for this job."""
        self._stages = stages
        self._total = sum(stage.rows for stage in stages)
        self._submitted = start.submitted
        self._first: float | None = None
        self._compute_s = 0.0
        self._passes = 0
        self._jobs_beside = 0
        self._phases: dict[Phase, list[float]] = {}
        self._reported = 0.0
        self._last_step = (Phase.ENCODING, 0)

    def add(self, rows: int, reused: int, jobs: int, begin: float, duration_s: float) -> None:
        """Count a pass of ``duration_s`` seconds that began at ``begin`` (monotonic) and that ``jobs`` jobs shared.

        ``rows`` is the number of this job's network rows that it answered, 0 for a pass of any other kind; ``reused``
        of them were computed for another job.
        """
        self._count(rows, reused, begin, duration_s)
        self._compute_s += duration_s
        if rows:
            self._passes += 1
            self._jobs_beside += jobs

    def reuse(self, is_network: bool, at: float) -> None:
        """Count a row whose answer was kept from an earlier pass, at a time ``at`` (monotonic)."""
        self._count(int(is_network), int(is_network), at, 0.0)

    def _count(self, rows: int, reused: int, begin: float, duration_s: float) -> None:
        phase = self._stages[0].phase if rows and not self.rows else self.phase
        span = self._phases.setdefault(phase, [begin, begin])
        span[1] = begin + duration_s
        if rows:
            self._first = self._first or begin
        self.rows += rows
        self.reused += reused

    @property
    def phase(self) -> Phase:
        """The phase that the next row belongs to."""
        return self._position()[0]

    @property
    def step(self) -> int:
        """Finished steps of this phase."""
        return self._position()[1]

    def is_new_step(self) -> bool:
        """Whether phase or step changed since the last call of this method."""
        current, previous = (self.phase, self.step), self._last_step
        self._last_step = current
        return current != previous

    def due(self, now: float) -> bool:
        """Whether the last report is at least :data:`PROGRESS_EVERY_S` old; True counts as a report."""
        if now - self._reported < PROGRESS_EVERY_S:
            return False
        self._reported = now
        return True

    def snapshot(self, now: float) -> Progress:
        """The job's progress, with the remaining time estimated from its mean seconds per row so far."""
        phase, step, steps = self._position()
        pace = (now - self._first) / self.rows if self._first is not None and self.rows else 0.0
        fraction = self.rows / self._total if self._total else 0.0
        return Progress(phase, step, steps, min(1.0, fraction), eta_s=pace * (self._total - self.rows))

    def usage(self) -> Usage:
        """Queue time, compute time and network rows of the job so far."""
        return Usage(
            queue_time_s=max(0.0, (self._first or self._submitted) - self._submitted),
            compute_time_s=self._compute_s,
            network_evaluations=self.rows,
            reused_evaluations=self.reused,
            mean_batch_size=self._jobs_beside / self._passes if self._passes else 0.0,
            phase_s={phase: end - begin for phase, (begin, end) in self._phases.items()},
        )

    def _position(self) -> tuple[Phase, int, int]:
        if self.rows == 0:
            return Phase.ENCODING, 0, 1
        left = self.rows
        for stage in self._stages:
            if left < stage.rows:
                return stage.phase, stage.steps_in(left), stage.steps
            left -= stage.rows
        return Phase.DECODING, 0, 1


def _stored_batch_class(job: Job) -> int | None:
    """Batch class of the stored inversion that the job starts from; None without one.

    Only in passes of that size does the network give the same bits as when the inversion was made.
    """
    match job:
        case InvertJob(inversion=Inversion(batch_class=batch_class)):
            return batch_class
        case EditJob(source=Stored(inversion=inversion)) | MaskJob(source=Stored(inversion=inversion)):
            return inversion.batch_class
        case _:
            return None


def now() -> float:
    """Seconds of the monotonic clock, which both processes share."""
    return time.monotonic()
