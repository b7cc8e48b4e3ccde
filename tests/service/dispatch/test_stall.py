"""What counts as a stall, by time and CPU time; and the CPU time of real processes."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
from support.waiting import until
from underpaint_server.cores import cpu_seconds, usable_cores
from underpaint_server.dispatch.stall import (
    FACTOR,
    MAX_KINDS,
    UNMEASURED_CPU_S,
    UNMEASURED_S,
    CpuUse,
    PassWatch,
)
from underpaint_server.engine.messages import Passing

FLOOR_S = 5.0
TICK_S = 0.25
WAKE_UPS = 1e-4
"""Share of a core that a process takes that waits and looks up once a second."""
PASS = Passing("mini", "denoise", (4, 8, 8), 4)


class Engine:
    """A watched process of a simulated time."""

    def __init__(self, *, cpu_clock: bool = True) -> None:
        self.use = CpuUse(FLOOR_S)
        self.passes = PassWatch(FLOOR_S)
        self._cpu_s: float | None = 100.0 if cpu_clock else None
        self.run(2 * FLOOR_S, 1.0)

    def measure(self, wall_s: float, cpu_s: float, report: Passing = PASS) -> None:
        """One pass that ended."""
        self.passes.begin(report, self._cpu_s)
        self.passes.end(wall_s, cpu_s)

    def begin(self, report: Passing = PASS) -> None:
        self.passes.begin(report, self._cpu_s)

    def run(self, seconds: float, share: float) -> bool:
        """Time passes, in which the process gets ``share`` of a core; whether it is then overdue."""
        for _ in range(int(seconds / TICK_S)):
            self._cpu_s = None if self._cpu_s is None else self._cpu_s + TICK_S * share
            self.use.look(self._cpu_s, TICK_S)
            self.passes.look(TICK_S)
        return self.passes.is_overdue(self.use)


def test_a_pass_that_waits_for_ever_is_noticed_after_seconds() -> None:
    engine = Engine()
    engine.measure(0.1, 0.2)
    engine.begin()
    assert not engine.run(FLOOR_S - 1, WAKE_UPS)
    assert engine.run(3, WAKE_UPS)


def test_a_pass_that_spins_for_ever_is_noticed_by_its_cpu_time() -> None:
    engine = Engine()
    engine.measure(0.1, 0.2)
    engine.begin()
    assert engine.run(2 * FLOOR_S, 1.0)


@pytest.mark.parametrize("share", [0.5, 0.02, 0.002])
def test_a_pass_that_hardly_gets_a_processor_is_never_overdue(share: float) -> None:
    engine = Engine()
    engine.measure(0.1, 0.2)
    engine.begin()
    assert not engine.run(FLOOR_S * 0.9 / share, share)


def test_a_slow_pass_has_ten_times_its_usual_time() -> None:
    engine = Engine()
    engine.measure(60.0, 120.0)
    engine.begin()
    assert not engine.run(FACTOR * 60.0, 2.0)
    assert engine.run(5, 2.0)


def test_more_rows_have_more_time() -> None:
    engine = Engine()
    engine.measure(10.0, 10.0)
    engine.begin(Passing(PASS.model, PASS.kind, PASS.shape, 4 * PASS.rows))
    assert not engine.run(FACTOR * 40.0, 1.0)
    assert engine.run(5, 1.0)


@pytest.mark.parametrize(
    "other",
    [
        Passing("mini", "pullback", PASS.shape, 4),
        Passing("mini", "decode", PASS.shape, 4),
        Passing("mini", "denoise", (4, 64, 64), 4),
        Passing("other", "denoise", PASS.shape, 4),
    ],
    ids=["gradient", "decoder", "larger image", "other model"],
)
def test_what_was_never_measured_has_minutes(other: Passing) -> None:
    engine = Engine()
    engine.measure(0.1, 0.2)
    engine.begin(other)
    assert not engine.run(UNMEASURED_S, WAKE_UPS)
    assert engine.run(5, WAKE_UPS)


def test_a_first_pass_that_computes_has_an_hour_of_all_cores() -> None:
    engine = Engine()
    engine.begin()
    assert not engine.run(UNMEASURED_CPU_S, usable_cores())
    assert engine.run(5, usable_cores())


def test_work_between_two_passes_has_minutes() -> None:
    engine = Engine()
    engine.measure(0.1, 0.2)
    assert not engine.run(UNMEASURED_S, WAKE_UPS)
    assert engine.run(5, WAKE_UPS)


def test_a_rest_counts_for_nothing() -> None:
    engine = Engine()
    engine.measure(0.1, 0.2)
    engine.run(UNMEASURED_S + 5, WAKE_UPS)
    engine.passes.rest()
    assert not engine.run(5, WAKE_UPS)


def test_one_slow_pass_is_forgotten() -> None:
    engine = Engine()
    engine.measure(100.0, 100.0)
    for _ in range(300):
        engine.measure(0.1, 0.2)
    engine.begin()
    assert engine.run(FLOOR_S + 1, WAKE_UPS)


def test_callers_cannot_fill_the_memory_with_shapes() -> None:
    engine = Engine()
    for number in range(2 * MAX_KINDS):
        engine.measure(0.1, 0.2, Passing("mini", "denoise", (4, number, 8), 4))
    engine.measure(0.1, 0.2)
    assert len(engine.passes._slowest) == MAX_KINDS
    engine.begin()
    assert engine.run(FLOOR_S + 1, WAKE_UPS)


def test_without_a_cpu_clock_only_minutes_count() -> None:
    engine = Engine(cpu_clock=False)
    assert engine.use.share is None
    engine.measure(0.1, 0.2)
    engine.begin()
    assert not engine.run(UNMEASURED_S, 1.0)
    assert engine.run(5, 1.0)


def test_nothing_is_said_of_a_process_before_it_was_watched_for_so_long() -> None:
    use = CpuUse(FLOOR_S)
    for _ in range(int(FLOOR_S / TICK_S)):
        assert use.share is None
        use.look(7.0, TICK_S)
    use.look(7.0, TICK_S)
    assert use.share == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell the CPU time of another process")
async def test_a_stopped_process_gets_no_cpu_time_and_one_that_waits_gets_some() -> None:
    code = "import time\nwhile True: time.sleep(0.01)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            first = cpu_seconds(process.pid)
            assert first is not None
            await until(lambda: (cpu_seconds(process.pid) or 0) > first)
            process.send_signal(signal.SIGSTOP)
            await until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
            stopped = cpu_seconds(process.pid)
            time.sleep(0.1)
            assert cpu_seconds(process.pid) == stopped
        finally:
            process.kill()
    assert cpu_seconds(process.pid) is None
