"""The engine's loop in a thread of the test, without processes and sockets."""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

from underpaint_server.backends.protocol import Backend
from underpaint_server.engine.loop import Engine
from underpaint_server.engine.messages import CancelJob, Ended, Passed, Report, StartJob, Stop
from underpaint_server.jobs import Job, Priority

from support.waiting import PATIENCE_S


class Inbox(queue.Queue[Any]):
    """The engine's inbox, with a way to put several orders there at one moment."""

    def put_together(self, orders: Sequence[Any]) -> None:
        with self.mutex:
            self.queue.extend(orders)
            self.not_empty.notify()


class Bench:
    """Start jobs, collect reports."""

    def __init__(
        self,
        backend: Backend,
        max_batch_size: int = 16,
        learn_share: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
        caps_file: Path | None = None,
        reuse_bytes: int = 0,
    ) -> None:
        self.reports: list[Report] = []
        self._out: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self.inbox = Inbox()
        self.engine = Engine(
            {backend.facts.info.id: backend}, cast(Any, self.inbox), self.hear, max_batch_size, learn_share,
            clock=clock, caps_file=caps_file, reuse_bytes=reuse_bytes,
        )  # fmt: skip
        self._thread = threading.Thread(target=self.engine.run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.inbox.put(Stop())
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def hear(self, report: Report) -> None:
        """Called for every report, in the engine's thread."""
        self._out.put(report)

    def start(
        self,
        id_: int,
        job: Job,
        *,
        priority: Priority = Priority.NORMAL,
        deadline_s: float | None = None,
        preview_every: int = 0,
    ) -> None:
        now = time.monotonic()
        deadline = None if deadline_s is None else now + deadline_s
        self.inbox.put(StartJob(id_, job, priority, now, deadline, preview_every))

    def start_together(self, jobs: Mapping[int, tuple[Job, Priority]]) -> None:
        """All of them before the engine's next pass, however the test's thread and the engine's are scheduled."""
        now = time.monotonic()
        self.inbox.put_together([StartJob(id_, *job, now, None, 0) for id_, job in jobs.items()])

    def cancel(self, id_: int) -> None:
        self.inbox.put(CancelJob(id_))

    def until_ended(self, *ids: int) -> dict[int, Any]:
        """Outcomes of these jobs, when all have one."""
        outcomes: dict[int, Any] = {}
        while not set(ids) <= outcomes.keys():
            report = self._out.get(timeout=PATIENCE_S)
            self.reports.append(report)
            if isinstance(report, Ended):
                outcomes[report.id] = report.outcome
        return outcomes

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """All jobs at once; their outcomes in order."""
        self.start_together({id_: (job, Priority.NORMAL) for id_, job in enumerate(jobs)})
        outcomes = self.until_ended(*range(len(jobs)))
        return [outcomes[id_] for id_ in range(len(jobs))]

    @property
    def passes(self) -> list[Passed]:
        """Forward passes of the network so far."""
        return [r for r in self.reports if isinstance(r, Passed) and r.is_network]
