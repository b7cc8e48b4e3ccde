"""A device that computes passes after they were queued, as a GPU does: the loop is one pass ahead of it, never more."""

import queue
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from support.engine import Bench
from support.jobs import edit_job, every_kind_of_job
from underpaint_server.backends.protocol import DeviceLost
from underpaint_server.backends.toy import SCALE, SHAPE, ToyBackend
from underpaint_server.engine.loop import Engine
from underpaint_server.engine.messages import Ended, Order, Passed, Passing, Report, StartJob, Stop
from underpaint_server.jobs import Priority
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.rows import Batch
from underpaint_server.settings import Settings

PX = SHAPE[1] * SCALE


@dataclass(eq=False)
class Queued:
    """A pass of the device."""

    device: "Later"
    number: int

    def wait(self) -> float:
        if self.number == self.device.breaks_at:
            raise DeviceLost("an illegal memory access")
        self.device.log.append(("waited", self.number))
        return float(self.number)


class Later(ToyBackend):
    """The toy, whose passes end when somebody waits for them; the n-th takes n seconds."""

    def __init__(self, breaks_at: int = -1) -> None:
        super().__init__("toy", Settings())
        self.log: list[tuple[str, int]] = []
        self.breaks_at = breaks_at
        self._last: Queued | None = None

    def predict(self, batch: Batch) -> Sequence[Any]:
        answers = super().predict(batch)
        number = sum(what == "queued" for what, _ in self.log) + 1
        self.log.append(("queued", number))
        self._last = Queued(self, number)
        return answers

    def unfinished(self) -> Queued | None:  # type: ignore[override]
        return self._last

    @property
    def passes(self) -> int:
        return max(number for _, number in self.log)


def run(backend: ToyBackend, *jobs: Any, priority: Priority = Priority.NORMAL) -> list[Report]:
    """The reports of an engine that runs these jobs together and then ends."""
    inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
    reports: list[Report] = []

    def report(message: Report) -> None:
        reports.append(message)
        if sum(isinstance(one, Ended) for one in reports) == len(jobs):
            inbox.put(Stop())

    engine = Engine({"toy": backend}, inbox, report, 16, 0.25)
    for number, job in enumerate(jobs):
        inbox.put(StartJob(number, job, priority, time.monotonic(), None, 0))
    engine.run()
    return reports


def test_a_pass_is_queued_while_the_one_before_is_computed_and_then_that_one_is_waited_for() -> None:
    backend = Later()
    run(backend, edit_job("toy", PX, SdEdit(0.8, 10)))
    unfinished, most = set[int](), 0
    for what, number in backend.log:
        if what == "queued":
            assert unfinished <= {number - 1}
            unfinished.add(number)
            most = max(most, len(unfinished))
        else:
            unfinished.remove(number)
    assert most == 2
    assert not unfinished


def test_what_is_reported_of_a_pass_is_the_time_that_the_device_took() -> None:
    backend = Later()
    reports = run(backend, *(edit_job("toy", PX, SdEdit(0.8, 10), seed=seed) for seed in range(3)))
    assert [one.duration_s for one in reports if isinstance(one, Passed)] == list(range(1, backend.passes + 1))


def test_passes_begin_and_end_in_turn_and_every_one_ends_before_its_job() -> None:
    """So who watches for a device that hangs knows which pass it is at."""
    jobs = every_kind_of_job("toy", PX, 6)
    for job in jobs:
        reports = [one for one in run(Later(), job) if isinstance(one, Passing | Passed | Ended)]
        assert isinstance(reports.pop(), Ended)
        assert [type(one) for one in reports] == [Passing, Passed] * (len(reports) // 2)
        pairs = zip(reports[::2], reports[1::2], strict=True)
        assert all(one.kind == other.kind for one, other in pairs if not isinstance(one, Ended | Passed))


def test_results_and_counts_are_those_of_a_device_that_computes_at_once() -> None:
    for job in every_kind_of_job("toy", PX, 6):
        ours, theirs = (
            [one for one in run(backend, job) if isinstance(one, Passed)]
            for backend in (Later(), ToyBackend("toy", Settings()))
        )
        assert [one.rows_by_method for one in ours] == [one.rows_by_method for one in theirs]


def test_nothing_is_left_unfinished_when_no_job_is_left() -> None:
    backend = Later()
    with Bench(backend) as bench:
        bench.start(1, edit_job("toy", PX, SdEdit(0.8, 10)))
        bench.until_ended(1)
        assert Counter(what for what, _ in backend.log) == dict.fromkeys(("queued", "waited"), backend.passes)
        bench.start(2, edit_job("toy", PX, SdEdit(0.8, 1000)))
        bench.cancel(2)
        bench.until_ended(2)
    assert Counter(what for what, _ in backend.log) == dict.fromkeys(("queued", "waited"), backend.passes)


def test_a_device_that_fails_in_a_pass_that_was_queued_ends_the_engine() -> None:
    with pytest.raises(DeviceLost):
        run(Later(breaks_at=5), edit_job("toy", PX, SdEdit(0.8, 10)))
