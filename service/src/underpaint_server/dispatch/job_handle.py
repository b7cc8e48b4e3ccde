"""A submitted job as its callers hold it: progress and previews while it runs, then one result; for many readers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from underpaint_server.dispatch.due import due
from underpaint_server.errors import UnderpaintError
from underpaint_server.jobs import Job, Phase, Preview, Priority, Progress, Result
from underpaint_server.methods import job_name
from underpaint_server.plans import image_pixels, total_rows

HEARTBEAT_S = 5.0
"""Longest time between two events of :meth:`JobHandle.events`, in seconds; proxies close idle streams."""


@dataclass(slots=True)
class _Latest:
    """The newest value of one kind; a slow reader misses those in between."""

    value: Progress | Preview | None = None
    version: int = 0

    def put(self, value: Progress | Preview) -> None:
        self.value, self.version = value, self.version + 1


class JobHandle:
    """A job in the queue or in the engine, returned by ``Dispatcher.submit``. To be used on the front's event loop.

    ``submitted`` and ``deadline`` are readings of ``time.monotonic``; ``deadline`` None is no deadline. ``rows_left``
    counts the network rows still to be computed; ``row_s`` is the device time in seconds that one of them is estimated
    to take, 0 where that is not known.
    """

    def __init__(
        self,
        id_: int,
        job: Job,
        priority: Priority,
        submitted: float,
        deadline: float | None,
        preview_every: int,
        on_cancel: Callable[["JobHandle"], None],
        on_extend: Callable[["JobHandle"], None],
        row_s: float = 0.0,
    ) -> None:
        self.id = id_
        self.job = job
        self.priority = priority
        self.submitted = submitted
        self.deadline = deadline
        self.preview_every = preview_every
        self.name = job_name(job)
        """What the job is called in metrics, see :func:`underpaint_server.methods.job_name`."""
        self._rows = self.rows_left = total_rows(job)
        self.pixels = image_pixels(job)
        """Pixels of the image that its rows are for."""
        self.due = due(submitted, self._rows * row_s, deadline)
        """Virtual deadline (monotonic), by which jobs of one priority are ordered."""
        self.cancelled_at: float | None = None
        self._on_cancel = on_cancel
        self._on_extend = on_extend
        self._progress = _Latest(Progress(Phase.QUEUED, 0, 0, 0.0), 1)
        self._preview = _Latest()
        self._outcome: Result | UnderpaintError | None = None
        self._changed = asyncio.Event()

    # --- for callers ---------------------------------------------------------------------------------------------

    @property
    def queue_position(self) -> int:
        """Position in the queue, 1 for its head; 0 once the job runs."""
        return self.progress.queue_position

    @property
    def progress(self) -> Progress:
        """The newest progress."""
        assert isinstance(self._progress.value, Progress)
        return self._progress.value

    @property
    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self._outcome is not None

    async def events(self) -> AsyncIterator[Progress | Preview]:
        """Yield progress and previews as they change, until the job ends.

        After :data:`HEARTBEAT_S` without a change, yields the newest progress again. Readers are independent of each
        other; a slow one gets the newest value and misses those in between.
        """
        progress_version = preview_version = 0
        while not self.done:
            changed = self._changed
            if self._preview.version > preview_version and self._preview.value is not None:
                preview_version = self._preview.version
                yield self._preview.value
            elif self._progress.version > progress_version and self._progress.value is not None:
                progress_version = self._progress.version
                yield self._progress.value
            else:
                try:
                    async with asyncio.timeout(HEARTBEAT_S):  # wait_for may lose a cancel that comes with the event
                        await changed.wait()
                except TimeoutError:
                    progress_version = 0

    async def result(self) -> Result:
        """Wait for the result; raises the :class:`UnderpaintError` that ended the job."""
        while self._outcome is None:
            await self._changed.wait()
        if isinstance(self._outcome, UnderpaintError):
            raise self._outcome
        return self._outcome

    def extend(self, deadline: float | None) -> None:
        """Move the deadline to ``deadline`` if that is later, because another caller waits for the same job.

        ``deadline`` is a reading of ``time.monotonic``; None removes the deadline.
        """
        if self.done or self.deadline is None or (deadline is not None and deadline <= self.deadline):
            return
        self.deadline = deadline
        self._on_extend(self)

    def cancel(self) -> None:
        """Cancel the job: the next pass no longer contains its rows. Does nothing if the job has ended."""
        if not self.done:
            self._on_cancel(self)

    # --- for the dispatcher --------------------------------------------------------------------------------------

    def move(self, position: int) -> None:
        """Set the position in the queue, 1 for its head; 0 when the job goes to the engine."""
        if position != self.queue_position or self._progress.version == 1:
            self._put(self._progress, Progress(Phase.QUEUED, 0, 0, 0.0, queue_position=position))

    def advance(self, progress: Progress, rows: int) -> None:
        """Set the progress; ``rows`` network rows of the job are done. The fraction never decreases."""
        self.rows_left = max(0, self._rows - rows)
        self._put(self._progress, replace(progress, fraction=max(self.progress.fraction, progress.fraction)))

    def show(self, preview: Preview) -> None:
        """Set the newest preview."""
        self._put(self._preview, preview)

    def end(self, outcome: Result | UnderpaintError) -> bool:
        """Set the job's outcome; False if it had one already, which then stays."""
        if self.done:
            return False
        self._outcome = outcome
        self._wake()
        return True

    def _put(self, latest: _Latest, value: Progress | Preview) -> None:
        latest.put(value)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
