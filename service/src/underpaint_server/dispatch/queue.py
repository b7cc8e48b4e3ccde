"""Admission, the queue, and the handling of the engine's reports, in the front process.

The queue is here and not in the engine process, so that callers get their queue position at once, a job that is
cancelled or late while it waits never reaches the device, and a crash of the engine ends only the jobs inside it.
"""

import asyncio
import itertools
import time
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

import structlog

from underpaint_server.dispatch.costs import RowCosts
from underpaint_server.dispatch.job_handle import JobHandle
from underpaint_server.dispatch.pace import Pace
from underpaint_server.dispatch.stall import PassWatch
from underpaint_server.dispatch.supervisor import LOADING_S, EngineState, Listener, Supervisor
from underpaint_server.engine.messages import (
    Advanced,
    CancelJob,
    Capped,
    Ended,
    ExtendJob,
    Passed,
    Passing,
    Previewed,
    Ready,
    Report,
    Reused,
    Split,
    StartJob,
)
from underpaint_server.errors import (
    Cancelled,
    DeadlinePassed,
    DeadlineUnattainable,
    Draining,
    ModelLoading,
    ModelNotReady,
    QueueFull,
    UnderpaintError,
    WorkerRestarted,
)
from underpaint_server.jobs import Job, ModelInfo, Priority, Usage
from underpaint_server.plans import image_pixels, plan
from underpaint_server.settings import Settings
from underpaint_server.telemetry import Metrics, in_background, report_unexpected

log = structlog.get_logger(__name__)

WATCH_S = 0.25
"""Seconds between two checks of waiting jobs' deadlines and of the engine's progress."""

MAX_CAPS = 64
"""Most sizes of images whose largest pass is remembered. Callers choose the sizes."""

DEADLINE_TOLERANCE_S = 0.1
"""Seconds before its deadline from which a job that is cancelled counts as late: the caller's clock may be ahead."""


class Dispatcher:
    """Owns the queue and the engine process. All methods are to be called on one event loop; none blocks it.

    ``clock`` gives monotonic seconds; ``supervisor`` makes what owns the engine process.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        supervisor: Callable[[Settings, Metrics, Listener], Supervisor] = Supervisor,
    ) -> None:
        self.configured = tuple(name for name, _ in settings.model_locations)
        """Ids of the configured models, the default first."""
        self._settings = settings
        self._metrics = metrics
        self._infos: dict[str, ModelInfo] = {}
        self._clock = clock
        self._engine = supervisor(settings, metrics, self)
        self._ids = itertools.count(1)
        self._waiting: list[JobHandle] = []
        self._running: dict[int, JobHandle] = {}
        self._draining = False
        self._pace = Pace(settings.max_batch_size)
        self._passes = PassWatch(settings.stall_s)
        self._watch_fails = False
        self._costs = RowCosts()
        self._caps: OrderedDict[tuple[str, str, int], int] = OrderedDict()
        """(model, kind, pixels) -> most rows of a pass; the sizes reported last at the end."""
        self._watching: asyncio.Task[None] | None = None

    # --- what others read ----------------------------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        """State of the engine process."""
        return self._engine.state

    @property
    def error(self) -> str:
        """Why the state is FAILED; empty in any other state."""
        return self._engine.error

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """Id -> description of the loaded models, in the configured order; empty until the engine was ready once."""
        return self._infos

    @property
    def errors(self) -> Mapping[str, str]:
        """Id -> why the model cannot be served, of each model that the engine process could not load."""
        return {name: error.message for name, error in self._engine.errors.items()}

    @property
    def models_ready(self) -> Mapping[str, bool]:
        """Id of each configured model -> whether jobs of it are run now."""
        ready = self.state is EngineState.READY
        return {name: ready and name in self._infos for name in self.configured}

    @property
    def stalled(self) -> bool:
        """Whether the engine process makes no progress, cannot be started or cannot be watched."""
        overdue = bool(self._running) and self._passes.is_overdue(self._engine.use)
        return overdue or self._engine.is_stuck or self._watch_fails

    @property
    def num_running(self) -> int:
        """Jobs in the engine."""
        return len(self._running)

    @property
    def queue_capacity(self) -> int:
        """Most jobs of each priority that may wait in the queue."""
        return self._settings.queue_capacity

    @property
    def backlog_s(self) -> float:
        """Estimated seconds of device time for the rows of all waiting and running jobs."""
        return self._cost_s([*self._waiting, *self._running.values()])

    def _cost_s(self, jobs: Iterable[JobHandle]) -> float:
        return sum(job.rows_left * self._costs.row_s(job.job.model, job.pixels) for job in jobs)

    @property
    def last_pass_at(self) -> float | None:
        """Unix time of the last network pass; None before the first."""
        return self._pace.last_pass_at

    @property
    def max_batch_sizes(self) -> Mapping[tuple[str, str, str], int]:
        """(model, kind of row, size of its image) -> most rows of a pass, where that is learned; the smallest of all
        such images. A size is "own", "smaller" or "larger", compared with the model's own."""
        sizes: dict[tuple[str, str, str], int] = {}
        for (model, kind, pixels), rows in [*self._caps.items()]:
            if model in self._infos:
                own = self._infos[model].width * self._infos[model].height
                name = (model, kind, "own" if pixels == own else "smaller" if pixels < own else "larger")
                sizes[name] = min(rows, sizes.get(name, rows))
        return sizes

    def num_waiting(self, priority: Priority) -> int:
        """Jobs of ``priority`` in the queue."""
        return sum(job.priority is priority for job in self._waiting)

    # --- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine process, without waiting until it is ready."""
        self._engine.start()
        self._watching = in_background(self._watch())

    async def wait_ready(self) -> None:
        """Wait until the engine is ready; raises :class:`ModelNotReady` if it failed for good or is closed."""
        await self._engine.wait_ready()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new jobs, wait up to ``timeout_s`` seconds for the others, then end those that are left."""
        self._draining = True
        end = self._clock() + timeout_s
        while (self._waiting or self._running) and self._clock() < end:
            await asyncio.sleep(0.02)
        for job in [*self._waiting, *self._running.values()]:
            self._settle(job, Draining("the server stopped before the job was done; send it again", retry_after_s=1.0))

    async def close(self) -> None:
        """End all jobs with :class:`Draining`, then the engine process."""
        self._draining = True
        if self._watching is not None:
            self._watching.cancel()
        for job in [*self._waiting, *self._running.values()]:
            self._settle(job, Draining("the server stopped; send the request again", retry_after_s=1.0))
        await self._engine.stop()

    # --- admission -----------------------------------------------------------------------------------------------

    def submit(self, job: Job, *, priority: Priority, deadline_s: float | None, preview_every: int = 0) -> JobHandle:
        """Put a job into the queue.

        ``deadline_s`` is in seconds from now, None for no deadline. ``preview_every`` is the number of denoising steps
        from one preview to the next, 0 for no previews. Jobs of higher priorities start first, those of one priority in
        the order of their virtual deadlines. Each priority has a queue and running slots of its own; LEARNING jobs are
        never refused for a full queue, and need no running slot.

        Raises :class:`Draining`, :class:`ModelLoading`, :class:`WorkerRestarted`, :class:`ModelNotReady`,
        :class:`QueueFull` or :class:`DeadlineUnattainable`; then the job was not enqueued.
        """
        self._check_open(job.model)
        now = self._clock()
        deadline = None if deadline_s is None else now + deadline_s
        row_s = self._costs.row_s(job.model, image_pixels(job))
        handle = JobHandle(
            next(self._ids), job, priority, now, deadline, preview_every, self._cancel, self._extend, row_s
        )
        self._check_deadline(handle, deadline_s)
        queued = self.num_waiting(priority)
        if self._is_full(priority) and queued >= self.queue_capacity:
            raise QueueFull(
                f"the queue is full: {queued} jobs of this priority wait; retry later",
                retry_after_s=self._retry_after_s(priority),
            )
        insort(self._waiting, handle, key=_order)
        self._dispatch()
        return handle

    def _check_open(self, model: str) -> None:
        if self._draining:
            raise Draining("this server is stopping; retry, another replica may take the call", retry_after_s=1.0)
        match self.state:
            case EngineState.STARTING:
                raise ModelLoading("the models are being loaded; retry later", retry_after_s=LOADING_S)
            case EngineState.RESTARTING:
                raise WorkerRestarted(
                    "the engine process is being restarted; retry later", retry_after_s=self._engine.restart_s
                )
            case EngineState.FAILED:
                raise self._engine.refusal
            case _ if model in self._engine.errors:
                raise self._not_ready(model)
            case _:
                return

    def _not_ready(self, model: str) -> ModelNotReady:
        return ModelNotReady(f"{model} failed to load: {self.errors[model]}")

    def _check_deadline(self, handle: JobHandle, deadline_s: float | None) -> None:
        """Refuse a job that cannot meet its deadline at the best known pace, even if running jobs took no time."""
        now = self._clock()
        estimate_s = self._pace.least_s(handle.job.model, handle.pixels, plan(handle.job), now)
        if self._is_full(handle.priority):
            ahead = [o for o in self._waiting if o.priority is handle.priority and _order(o) < _order(handle)]
            # All but so many of them must end before the job starts; which these are is not known, so the shortest.
            ending = len(ahead) - self._settings.max_running + 1
            costs_s = sorted(self._pace.least_rows_s(o.job.model, o.pixels, o.rows_left, now) for o in ahead)
            estimate_s += sum(costs_s[: max(0, ending)])
        if deadline_s is not None and estimate_s > deadline_s:
            self._metrics.on_deadline_missed(method=handle.name, stage="at_admission")
            raise DeadlineUnattainable(
                f"the job needs {estimate_s:.1f} s or more and the deadline is in {deadline_s:.1f} s; set a later "
                "deadline or ask for fewer steps",
                metadata={"estimate_s": f"{estimate_s:.3f}"},
            )

    def _retry_after_s(self, priority: Priority) -> float:
        """Estimated seconds until one slot is free in the queue of this priority, 0.2 to 30."""
        jobs = [job for job in (*self._waiting, *self._running.values()) if job.priority >= priority]
        return min(30.0, max(0.2, self._cost_s(jobs) / max(1, len(jobs))))

    # --- queue ---------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Send jobs from the head of the queue to the engine while it has free slots; update the others' positions."""
        while (job := self._next()) is not None:
            self._waiting.remove(job)
            if not self._running:
                self._passes.rest()
            self._running[job.id] = job
            job.move(0)
            self._engine.send(
                StartJob(job.id, job.job, job.priority, job.submitted, job.deadline, job.preview_every, job.due)
            )
        for position, job in enumerate(self._waiting):
            job.move(position + 1)

    def _next(self) -> JobHandle | None:
        """The first waiting job that may go to the engine now, or None."""
        if self.state is not EngineState.READY:
            return None
        full = {priority for priority in Priority if self._is_full(priority)}
        return next((job for job in self._waiting if job.priority not in full), None)

    def _is_full(self, priority: Priority) -> bool:
        """Whether all running slots of this priority are taken. Learning needs none: it runs long and is limited by
        ``learn_share``."""
        taken = sum(job.priority is priority for job in self._running.values())
        return priority is not Priority.LEARNING and taken >= self._settings.max_running

    def _cancel(self, job: JobHandle) -> None:
        """End the job for its callers at once; its running slot is free when the engine reports its end."""
        if job in self._waiting:
            self._count_cancelled(job, "queued")
            self._settle(job, Cancelled("the job was cancelled while it was queued"))
        elif job.id in self._running:
            self._count_cancelled(job, "running")
            job.cancelled_at = self._clock()
            self._engine.send(CancelJob(job.id))
            job.end(Cancelled("the job was cancelled while it was running"))

    def _count_cancelled(self, job: JobHandle, stage: str) -> None:
        """Count a cancelled job. When a deadline passes, gRPC cancels the call before anything here sees it late."""
        if job.deadline is not None and self._clock() >= job.deadline - DEADLINE_TOLERANCE_S:
            self._metrics.on_deadline_missed(method=job.name, stage=stage)
        else:
            self._metrics.on_cancelled(method=job.name, stage=stage)

    def _extend(self, job: JobHandle) -> None:
        if job.id in self._running:
            self._engine.send(ExtendJob(job.id, job.deadline))

    def _settle(self, job: JobHandle, outcome: UnderpaintError) -> None:
        """End a job with ``outcome`` and remove it from the queue and from the engine."""
        if job in self._waiting:
            self._waiting.remove(job)
        elif self._running.pop(job.id, None) is not None:
            self._engine.send(CancelJob(job.id))
        job.end(outcome)
        self._dispatch()

    # --- reports of the engine -----------------------------------------------------------------------------------

    def on_report(self, report: Report) -> None:
        """See :class:`underpaint_server.dispatch.supervisor.Listener`."""
        match report:
            case Ready():
                self._on_ready(report)
            case Passing():
                self._passes.begin(report, self._engine.cpu_s())
            case Passed():
                self._on_passed(report)
            case Reused(model=model, kind=kind, rows=rows):
                self._metrics.on_reused(model=model, kind=kind, rows=rows)
            case Capped():
                self._on_capped(report)
            case Split(model=model, reason=reason):
                self._metrics.on_batch_split(model=model, reason=reason)
            case Advanced(id=id_, progress=progress, rows=rows):
                if id_ in self._running:
                    self._running[id_].advance(progress, rows)
            case Previewed(id=id_, preview=preview):
                if id_ in self._running:
                    self._running[id_].show(preview)
            case Ended():
                self._on_ended(report)

    def _on_ready(self, report: Ready) -> None:
        self._passes.rest()
        self._infos = {info.id: info for info, _ in report.models}
        for info, seconds in report.models:
            self._metrics.on_model_loaded(info=info, seconds=seconds)
            log.info(
                "model ready",
                model=info.id,
                digest=info.digest,
                dtype=info.dtype,
                backend=info.backend,
                exactness=info.exactness.value,
                batch_class=info.batch_class,
                seconds=round(seconds, 2),
            )
        for name, error in report.failed.items():
            log.error("model failed to load", model=name, error=error.message)
        for job in [job for job in self._waiting if job.job.model in report.failed]:
            self._settle(job, self._not_ready(job.job.model))
        self._dispatch()

    def _on_passed(self, report: Passed) -> None:
        rows = sum(report.rows_by_method.values())
        self._passes.end(report.duration_s, report.cpu_s)
        if report.is_network:
            self._pace.add(report.model, report.pixels, rows, report.duration_s, self._clock())
            self._costs.add(report.model, report.pixels, rows, report.duration_s)
        self._metrics.on_pass(
            model=report.model,
            kind=report.kind,
            is_network=report.is_network,
            rows_by_method=report.rows_by_method,
            padding=report.padding,
            duration_s=report.duration_s,
        )
        for kind, size in report.memory_bytes.items():
            self._metrics.on_memory(device="0", kind=kind, bytes=size)

    def _on_capped(self, report: Capped) -> None:
        name = (report.model, report.kind, report.pixels)
        self._caps[name] = report.rows
        self._caps.move_to_end(name)
        if len(self._caps) > MAX_CAPS:
            self._caps.popitem(last=False)

    def _on_ended(self, report: Ended) -> None:
        job = self._running.pop(report.id, None)
        if job is None:
            return
        method = job.name
        if job.cancelled_at is not None:
            self._metrics.on_cancel_latency(model=job.job.model, seconds=self._clock() - job.cancelled_at)
        elif isinstance(report.outcome, DeadlinePassed):
            self._metrics.on_deadline_missed(method=method, stage="running")
        elif not isinstance(report.outcome, UnderpaintError):
            self._measure(method, job.priority, report.outcome.usage)
            self._engine.reset_crashes()
        job.end(report.outcome)
        self._dispatch()

    def _measure(self, method: str, priority: Priority, usage: Usage) -> None:
        self._metrics.on_queue_time(method=method, priority=priority, seconds=usage.queue_time_s)
        for phase, seconds in usage.phase_s.items():
            self._metrics.on_phase(phase=phase, method=method, seconds=seconds)

    def on_crash(self) -> None:
        """See :class:`underpaint_server.dispatch.supervisor.Listener`; jobs in the queue are kept."""
        lost, self._running = list(self._running.values()), {}
        for job in lost:
            job.end(
                WorkerRestarted(
                    "the engine process ended while the job ran in it; retry", retry_after_s=self._engine.restart_s
                )
            )

    def on_failed(self) -> None:
        """See :class:`underpaint_server.dispatch.supervisor.Listener`."""
        for job in [*self._waiting, *self._running.values()]:
            self._settle(job, self._engine.refusal)

    async def _watch(self) -> None:
        """Look after the queue and the engine process until cancelled."""
        last = self._clock()
        while True:
            await asyncio.sleep(WATCH_S)
            now = self._clock()
            try:
                # Bounded, because this process may have been suspended together with the engine's.
                self._look(now, min(now - last, 2 * WATCH_S))
            except Exception as error:
                report_unexpected("the engine cannot be watched", error)
                self._watch_fails = True
            else:
                self._watch_fails = False
            last = now

    def _look(self, now: float, elapsed_s: float) -> None:
        """End waiting jobs whose deadline passed; kill an engine process that makes no progress."""
        for job in [job for job in self._waiting if job.deadline is not None and job.deadline < now]:
            self._metrics.on_deadline_missed(method=job.name, stage="queued")
            self._settle(job, DeadlinePassed("the deadline passed while the job was queued; set a later deadline"))
        self._engine.look(elapsed_s)
        if self._running:
            self._passes.look(elapsed_s)
            if self._passes.is_overdue(self._engine.use):
                log.error("the engine makes no progress")
                self._engine.end_stalled()


def _order(job: JobHandle) -> tuple[int, float, int]:
    """Jobs in the queue are sorted by this."""
    return (-job.priority, job.due, job.id)
