"""A submitted job as its callers hold it: progress on the way, one result at the end, any number of readers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from underpaint_server.errors import UnderpaintError
from underpaint_server.jobs import Job, Phase, Preview, Priority, Progress, Result
from underpaint_server.plans import total_rows

HEARTBEAT_S = 5.0
"""Longest silence of :meth:`JobHandle.events`; proxies close quiet streams."""


@dataclass(slots=True)
class _Slot:
    """The newest of its kind; a slow reader skips to it."""

    value: Progress | Preview | None = None
    version: int = 0

    def put(self, value: Progress | Preview) -> None:
        self.value, self.version = value, self.version + 1


class JobHandle:
    """Returned by ``Dispatcher.submit``; lives on the front's loop."""

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
    ) -> None:
        self.id = id_
        self.job = job
        self.priority = priority
        self.submitted = submitted
        self.deadline = deadline
        self.preview_every = preview_every
        self.rows_left = total_rows(job)
        self.cancelled_at: float | None = None
        self._on_cancel = on_cancel
        self._on_extend = on_extend
        self._progress = _Slot(Progress(Phase.QUEUED, 0, 0, 0.0), 1)
        self._preview = _Slot()
        self._position = 0
        self._outcome: Result | UnderpaintError | None = None
        self._changed = asyncio.Event()

    # --- for callers ---------------------------------------------------------------------------------------------

    @property
    def queue_position(self) -> int:
        """Jobs ahead of this one in the queue; 0 once it runs."""
        return self._position

    @property
    def progress(self) -> Progress:
        """The newest snapshot."""
        assert isinstance(self._progress.value, Progress)
        return self._progress.value

    @property
    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self._outcome is not None

    async def events(self) -> AsyncIterator[Progress | Preview]:
        """The newest progress and the newest preview whenever there is one, and at least one event in 5 s.

        Ends when the job ended. Every reader has its own place; what a slow one misses is gone.
        """
        seen_progress = seen_preview = 0
        while not self.done:
            changed = self._changed
            if self._preview.version > seen_preview and self._preview.value is not None:
                seen_preview = self._preview.version
                yield self._preview.value
            elif self._progress.version > seen_progress and self._progress.value is not None:
                seen_progress = self._progress.version
                yield self._progress.value
            else:
                try:
                    async with asyncio.timeout(HEARTBEAT_S):  # wait_for may lose a cancel that comes with the event
                        await changed.wait()
                except TimeoutError:
                    seen_progress = 0

    async def result(self) -> Result:
        """The result; raises what ended the job instead, an :class:`UnderpaintError`."""
        while self._outcome is None:
            await self._changed.wait()
        if isinstance(self._outcome, UnderpaintError):
            raise self._outcome
        return self._outcome

    def extend(self, deadline: float | None) -> None:
        """Somebody with another deadline waits for this too: the later of the two counts, None for none at all.

        ``deadline`` is a reading of ``time.monotonic``.
        """
        if self.done or self.deadline is None or (deadline is not None and deadline <= self.deadline):
            return
        self.deadline = deadline
        self._on_extend(self)

    def cancel(self) -> None:
        """Give the job up; its rows are free before the next pass. Nothing happens if it has ended."""
        if not self.done:
            self._on_cancel(self)

    # --- for the engine handle -----------------------------------------------------------------------------------

    def move(self, position: int) -> None:
        """The queue moved: so many jobs are ahead now."""
        if position != self._position or self._progress.version == 1:
            self._position = position
            self._put(self._progress, Progress(Phase.QUEUED, 0, 0, 0.0, queue_position=position))

    def advance(self, progress: Progress, rows: int) -> None:
        """The engine got further: ``rows`` network rows in all."""
        self._position = 0
        self.rows_left = max(0, total_rows(self.job) - rows)
        before = self._progress.value
        floor = before.fraction if isinstance(before, Progress) else 0.0
        self._put(self._progress, replace(progress, fraction=max(floor, progress.fraction)))

    def show(self, preview: Preview) -> None:
        """The engine sent a look."""
        self._put(self._preview, preview)

    def end(self, outcome: Result | UnderpaintError) -> bool:
        """Settle the job; False if it was settled before (the first outcome stands)."""
        if self.done:
            return False
        self._outcome = outcome
        self._wake()
        return True

    def _put(self, slot: _Slot, value: Progress | Preview) -> None:
        slot.put(value)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
