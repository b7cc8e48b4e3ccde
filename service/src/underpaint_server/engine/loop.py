"""The loop of the engine process: admit jobs, schedule rows, run one forward pass, advance the jobs."""

import queue
import time
from collections import Counter as Tally
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from underpaint_server.backends.protocol import Backend, DeviceLost, Unfinished
from underpaint_server.engine.caps import Caps, kind_name
from underpaint_server.engine.failures import reported
from underpaint_server.engine.messages import (
    Advanced,
    CancelJob,
    Capped,
    Ended,
    ExtendJob,
    Order,
    Passed,
    Passing,
    Previewed,
    Report,
    Reused,
    Split,
    StartJob,
    Stop,
)
from underpaint_server.engine.reuse import Answers, Twins
from underpaint_server.engine.run import JobRun, now
from underpaint_server.engine.scheduler import Selection, WaitingRow, choose
from underpaint_server.engine.share import Turns
from underpaint_server.errors import Cancelled, DeadlinePassed, ModelNotFound, OutOfMemory, UnderpaintError
from underpaint_server.jobs import ModelInfo, Preview
from underpaint_server.models import tensors
from underpaint_server.rows import Batch, Decode, Key, is_network_row

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Queued:
    """A pass that the device may still be computing."""

    chosen: Selection
    passed: Passed
    """Its report, but for the duration."""
    unfinished: Unfinished


class Engine:
    """Runs all jobs of one device in one thread.

    Orders are read from ``inbox``; ``report`` is called with every report, in the thread of :meth:`run`. A pass has at
    most ``max_batch_size`` rows. ``learn_share``, (0, 1], is the share of device time that learning may use while
    other jobs wait. Rows with equal names are computed once; answers to them are kept in ``reuse_bytes`` bytes, and
    with 0 every row is computed. ``clock`` gives monotonic seconds. ``caps_file`` keeps what is learned of the sizes of
    passes.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        inbox: "queue.SimpleQueue[Order]",
        report: Callable[[Report], None],
        max_batch_size: int,
        learn_share: float,
        clock: Callable[[], float] = now,
        caps_file: Path | None = None,
        reuse_bytes: int = 0,
    ) -> None:
        self._backends = backends
        self._inbox = inbox
        self._report = report
        self._answers = Answers(reuse_bytes)
        self._reused: Tally[tuple[str, str]] = Tally()
        self._turns = Turns(learn_share)
        self._clock = clock
        names = {name: _function(backend.facts.info) for name, backend in backends.items()}
        self._caps = Caps(max_batch_size, caps_file, names)
        self._runs: dict[int, JobRun] = {}
        self._queued: _Queued | None = None
        self._stopping = False

    def run(self) -> None:
        """Run passes until a :class:`Stop` order arrives; orders are read between two passes.

        Raises :class:`DeviceLost` when the device fails for good.
        """
        while not self._stopping:
            self._admit()
            self._drop_late()
            self._answer_known()
            twins = Twins([row for run in self._runs.values() for row in run.waiting_rows()], self._answers)
            if rows := twins.firsts:
                turn = self._turns.next({row.priority for row in rows})
                chosen = choose(rows, turn, self._caps.__getitem__, self._minimum)
                self._advance(chosen, twins, *self._predict(chosen))
            self._report_reused()

    # --- admit ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Handle all orders in the inbox; without a running job, block until there is one."""
        if not self._runs:
            self._settle()
        while True:
            try:
                order = self._inbox.get(block=not self._runs)
            except queue.Empty:
                return
            match order:
                case StartJob():
                    self._start(order)
                case CancelJob(id=job):
                    self._end(job, Cancelled("cancelled by the caller"))
                case ExtendJob(id=job, deadline=deadline):
                    if job in self._runs:
                        self._runs[job].deadline = deadline
                case Stop():
                    self._stopping = True
                    return

    def _start(self, order: StartJob) -> None:
        backend = self._backends.get(order.job.model)
        try:
            if backend is None:
                raise ModelNotFound(f"the engine has no model '{order.job.model}'")  # noqa: TRY301
            self._runs[order.id] = JobRun(order, backend)
        except Exception as error:
            self._report(Ended(order.id, reported(error, order.id, order.job)))

    def _drop_late(self) -> None:
        late = [id_ for id_, run in self._runs.items() if run.deadline is not None and run.deadline < self._clock()]
        for id_ in late:
            self._end(id_, DeadlinePassed("the deadline passed while the job was running; set a later one"))

    def _end(self, job: int, outcome: UnderpaintError) -> None:
        run = self._runs.pop(job, None)
        if run is not None:
            run.close()
            self._report(Ended(job, outcome))

    # --- reuse ---------------------------------------------------------------------------------------------------

    def _answer_known(self) -> None:
        """Answer the rows whose answers are kept, until every job waits for one that has to be computed."""
        for run in list(self._runs.values()):
            while run.is_new_group and run.result is None and run.start.id in self._runs:
                run.is_new_group = False
                for row in list(run.waiting_rows()):
                    known = self._answers.get(row)
                    if known is not None:
                        self._take_reused(run, row)
                        run.progress.reuse(is_network_row(row.key.kind), self._clock())
                        self._answer(row, known)

    def _take_reused(self, run: JobRun, row: WaitingRow) -> None:
        """Note that the answer to a row was computed for another."""
        self._reused[row.key.model, kind_name(row.key)] += 1
        self._note_name(run, row)

    def _note_name(self, run: JobRun, row: WaitingRow) -> None:
        name = self._answers.name(row)
        if name is not None:
            run.names.add(name)

    def _report_reused(self) -> None:
        for (model, kind), rows in self._reused.items():
            self._report(Reused(model, kind, rows))
        self._reused.clear()

    # --- schedule ------------------------------------------------------------------------------------------------

    def _minimum(self, key: Key) -> int:
        return self._backends[key.model].minimum(key.kind)

    # --- predict -------------------------------------------------------------------------------------------------

    def _predict(self, chosen: Selection) -> tuple[list[Any], float, float]:
        """An answer or an exception for every row, the start of the pass (monotonic) and its duration in seconds."""
        begin, begin_cpu_s = self._clock(), time.process_time()
        key = chosen.rows[0].key
        answers = self._attempt(chosen)
        unfinished = self._backends[key.model].unfinished()
        if self._queued is not None:
            self._settle()
            self._report(_passing(chosen))
        duration_s, cpu_s = self._clock() - begin, time.process_time() - begin_cpu_s
        rows_by_method = Tally(self._runs[row.job].method for row in chosen.rows)
        memory = self._backends[key.model].memory_bytes()
        padding = chosen.size - len(chosen.rows)
        passed = Passed(
            key.model,
            kind_name(key),
            is_network_row(key.kind),
            rows_by_method,
            padding,
            duration_s,
            cpu_s,
            memory,
            self._pixels(key),
        )
        if unfinished is None:
            self._end_pass(chosen, passed)
        else:
            self._queued = _Queued(chosen, passed, unfinished)
        return answers, begin, duration_s

    def _settle(self) -> None:
        """Wait for the pass that was queued, and report it with the time that the device took.

        It is done when the next pass has been queued: so the device always has work, and the host is never more than
        one pass ahead of it, after which it would see orders late.
        """
        queued, self._queued = self._queued, None
        if queued is not None:
            self._end_pass(queued.chosen, replace(queued.passed, duration_s=queued.unfinished.wait()))

    def _end_pass(self, chosen: Selection, passed: Passed) -> None:
        self._turns.spend(
            passed.duration_s, chosen.rows[0].priority, {run.start.priority for run in self._runs.values()}
        )
        self._learn_cap(chosen.rows[0].key, len(chosen.rows), passed.duration_s)
        self._report(passed)

    def _learn_cap(self, key: Key, rows: int, duration_s: float) -> None:
        """Learn from a pass how large those of its key may be, where their size changes no bits."""
        if key.batch_class is not None:
            return
        self._caps.passed(key, rows, duration_s)
        if is_network_row(key.kind) and (most := self._caps.news(key)) is not None:
            self._report(Capped(key.model, kind_name(key), self._pixels(key), most))

    def _pixels(self, key: Key) -> int:
        """Pixels of the image of a network row; 0 for other rows."""
        if not is_network_row(key.kind):
            return 0
        _, height, width = key.shape
        return height * width * self._backends[key.model].facts.vae_scale ** 2

    def _attempt(self, chosen: Selection) -> list[Any]:
        """Run one forward pass; if it fails, smaller ones, so that only the jobs at fault fail."""
        key = chosen.rows[0].key
        rows = [self._runs[row.job].row(row.index) for row in chosen.rows]
        if self._queued is None:  # otherwise the device is still at that pass
            self._report(_passing(chosen))
        try:
            return list(self._backends[key.model].predict(Batch(rows, chosen.size)))
        except DeviceLost:
            raise
        except OutOfMemory as error:
            return self._attempt(chosen) if self._answers.clear() else self._attempt_smaller(chosen, error)
        except Exception as error:
            if len({row.job for row in chosen.rows}) == 1:
                return [error] * len(rows)
            self._report(Split(key.model, "error"))
            return [self._attempt(replace(chosen, rows=(row,)))[0] for row in chosen.rows]

    def _attempt_smaller(self, chosen: Selection, error: OutOfMemory) -> list[Any]:
        """Halve a pass that the device's memory cannot hold; rows of a batch class, which need a pass of exactly that
        size, fail."""
        rows, key = chosen.rows, chosen.rows[0].key
        if key.batch_class is not None or len(rows) == 1:
            return [error] * len(rows)
        self._report(Split(key.model, "oom"))
        self._caps.failed(key, len(rows))
        middle = len(rows) // 2
        parts = (rows[:middle], rows[middle:])
        return [
            answer for part in parts for answer in self._attempt(Selection(part, max(len(part), self._minimum(key))))
        ]

    # --- advance -------------------------------------------------------------------------------------------------

    def _advance(self, chosen: Selection, twins: Twins, answers: list[Any], begin: float, duration_s: float) -> None:
        """Hand every answer to its job and to the jobs that wait for the same; one that fails does not affect the
        others."""
        served: list[tuple[WaitingRow, Any]] = []
        owned, reused = Tally(row.job for row in chosen.rows), Tally[int]()
        for row, answer in zip(chosen.rows, answers, strict=True):
            served.append((row, answer))
            if not isinstance(answer, Exception):  # the others then try for themselves
                self._answers.keep(row, answer)
                self._note_name(self._runs[row.job], row)
                for twin in twins.of(row):
                    served.append((twin, answer))
                    reused[twin.job] += 1
                    self._take_reused(self._runs[twin.job], twin)
        is_network = is_network_row(chosen.rows[0].key.kind)
        jobs = owned.keys() | reused.keys()
        for job in jobs:
            run = self._runs[job]
            rows = (owned[job] + reused[job], reused[job]) if is_network else (0, 0)
            run.progress.add(*rows, len(jobs), begin, duration_s)
        for row, answer in served:
            if row.job in self._runs:
                self._answer(row, answer)

    def _answer(self, row: WaitingRow, answer: Any) -> None:
        run = self._runs[row.job]
        try:
            if isinstance(answer, Exception):
                raise answer  # noqa: TRY301
            moved = run.answer(row.index, answer)
        except Exception as error:
            self._answers.forget(run.names)  # one of them may be at fault
            self._end(row.job, reported(error, row.job, run.start.job))
            return
        if run.result is not None:
            del self._runs[row.job]
            self._settle()
            self._report(Ended(row.job, replace(run.result, usage=run.progress.usage())))
        else:
            self._report_progress(run, moved)

    def _report_progress(self, run: JobRun, moved: bool) -> None:
        if run.progress.due(self._clock()):
            self._report(Advanced(run.start.id, run.progress.snapshot(self._clock()), run.progress.rows))
        preview_row = run.take_preview() if moved else None
        if preview_row is not None:
            self._report_preview(run, preview_row)

    def _report_preview(self, run: JobRun, row: Decode) -> None:
        """Decode and report a preview in a pass of its own; skip it if that fails, since no result depends on it."""
        backend = self._backends[run.start.job.model]
        size = backend.batch_class(Decode, tuple(row.latents.shape)) or backend.minimum(Decode)
        try:
            (image,) = backend.predict(Batch([row], size))
        except DeviceLost:
            raise
        except Exception as error:
            log.warning("preview failed", error=str(error))
            return
        self._report(Previewed(run.start.id, Preview(tensors.picture(image), run.progress.step)))


def _function(info: ModelInfo) -> str:
    """A name that models have in common which compute the same in the same way, device and threads included."""
    return f"{info.digest[:16]}-{info.fingerprint[:16]}"


def _passing(chosen: Selection) -> Passing:
    key = chosen.rows[0].key
    return Passing(key.model, kind_name(key), key.shape, chosen.size)
