"""The engine process from its start to its end: refused, killed, stopped, broken, replaced by its spare; real ones."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import pytest
from support.jobs import edict_options, invert_job, learn_job
from support.waiting import PATIENCE_S, until
from underpaint_server.backends.toy import SCALE, SHAPE
from underpaint_server.dispatch.job_handle import JobHandle
from underpaint_server.dispatch.queue import Dispatcher
from underpaint_server.dispatch.supervisor import EngineState
from underpaint_server.engine.messages import Passed, Passing, Report
from underpaint_server.errors import ModelNotReady, WorkerRestarted
from underpaint_server.jobs import Descent, Inverted, Job, Priority
from underpaint_server.settings import Settings
from underpaint_server.telemetry import Metrics

PX = SHAPE[1] * SCALE
SETTINGS = Settings(models="toy=toy:")
IMPATIENT = Settings(models="toy=toy:", stall_s=1)
ENDLESS = learn_job("toy", PX, method=Descent(1_000_000, 0.05), iterations=1_000_000)
SHORT = invert_job("toy", PX, edict_options(10))


@asynccontextmanager
async def running(settings: Settings = SETTINGS) -> AsyncIterator[Dispatcher]:
    """An engine that was started and may not be ready; it leaves no process behind."""
    handle = Dispatcher(settings, Metrics())
    await handle.start()
    try:
        yield handle
    finally:
        await handle.close()
    assert not engines()


def engines() -> list[psutil.Process]:
    """The engine processes, the oldest first; those that ended and were not reaped have no command line any more."""
    return sorted(filter(_is_engine, psutil.Process().children()), key=psutil.Process.create_time)


def _is_engine(child: psutil.Process) -> bool:
    try:
        return child.status() == psutil.STATUS_ZOMBIE or "spawn_main" in " ".join(child.cmdline())
    except psutil.NoSuchProcess:  # it ended a moment ago
        return False


def two_engines() -> list[psutil.Process]:
    """The engine process and its spare; nothing while there is only one."""
    found = engines()
    return found if len(found) == 2 else []


def submit(engine: Dispatcher, job: Job) -> JobHandle:
    return engine.submit(job, priority=Priority.NORMAL, deadline_s=None)


def restarts(engine: Dispatcher, reason: str) -> float:
    return engine._metrics.registry.get_sample_value("underpaint_engine_restarts_total", {"reason": reason}) or 0.0


async def replaced(engine: Dispatcher, times: int = 1) -> None:
    """Wait until the engine process was replaced so often, and its successor is ready."""
    await until(lambda: sum(restarts(engine, reason) for reason in ("crash", "stall")) >= times)
    await until(lambda: engine.state is EngineState.READY)


async def test_an_engine_that_keeps_dying_is_given_up_until_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("underpaint_server.dispatch.supervisor.FIRST_DELAY_S", 0.001)
    monkeypatch.setattr("underpaint_server.dispatch.supervisor.MAX_CRASHES", 1)
    async with running() as engine:
        for _ in range(2):
            await until(lambda: engine.state is EngineState.READY)
            engines()[-1].kill()
            await until(lambda: engine.state is not EngineState.READY)
        assert engine.state is EngineState.FAILED
        with pytest.raises(WorkerRestarted, match="in a row"):
            submit(engine, SHORT)
        await until(lambda: engine.state is EngineState.READY)
        assert engine.error == ""
        assert isinstance(await submit(engine, SHORT).result(), Inverted)


@pytest.mark.parametrize("when", ["at the start", "after a crash"])
async def test_an_engine_that_the_system_refuses_is_tried_again(when: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with running() as engine:
        if when == "after a crash":
            await engine.wait_ready()
        pid = engines()[-1].pid
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # poll, which other threads use, needs a few
        try:
            os.kill(pid, signal.SIGKILL)
            await until(lambda: engine.stalled)  # which liveness says
            assert engine.state is EngineState.RESTARTING
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await until(lambda: engine.state is EngineState.READY)
        assert not engine.stalled
        assert isinstance(await submit(engine, SHORT).result(), Inverted)


async def test_a_start_without_a_free_thread_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError(f"can't start new thread {thread.name}")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    async with running() as engine:
        await until(lambda: engine.stalled)
        assert not engines()
        monkeypatch.undo()
        await engine.wait_ready()


async def test_a_report_that_cannot_be_handled_costs_the_jobs_inside_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a fault")

    async with running() as engine:
        await engine.wait_ready()
        monkeypatch.setattr(engine, "_on_passed", fail)
        with pytest.raises(WorkerRestarted):
            await submit(engine, SHORT).result()
        monkeypatch.undo()
        await replaced(engine)
        assert isinstance(await submit(engine, SHORT).result(), Inverted)


async def test_an_engine_that_cannot_be_watched_is_said_to_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a fault")

    async with running() as engine:
        monkeypatch.setattr(engine, "_look", fail)
        await until(lambda: engine.stalled)
        monkeypatch.undo()
        await until(lambda: not engine.stalled)


async def test_an_engine_that_is_stopped_while_it_loads_computes_or_waits_is_replaced() -> None:
    async with running(IMPATIENT) as engine:
        for number, doing in enumerate(("loading", "computing", "waiting")):
            job = submit(engine, ENDLESS) if doing == "computing" else None
            engines()[-1].send_signal(signal.SIGSTOP)
            if job is not None:
                with pytest.raises(WorkerRestarted):
                    await job.result()
            await replaced(engine, number + 1)
        assert isinstance(await submit(engine, SHORT).result(), Inverted)
        assert restarts(engine, "crash") == 0


async def test_a_pass_that_never_ends_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(IMPATIENT) as engine:
        await engine.wait_ready()
        await submit(engine, SHORT).result()
        hear, begun = engine.on_report, asyncio.Event()

        def hear_one_begin(report: Report) -> None:
            if isinstance(report, Passing | Passed) and begun.is_set():
                return
            hear(report)
            if isinstance(report, Passing):
                begun.set()

        monkeypatch.setattr(engine, "on_report", hear_one_begin)
        with pytest.raises(WorkerRestarted):
            await submit(engine, ENDLESS).result()
        monkeypatch.undo()
        await replaced(engine)
        assert isinstance(await submit(engine, SHORT).result(), Inverted)


async def test_a_spare_engine_takes_over_and_is_replaced() -> None:
    async with running(SETTINGS.model_copy(update={"spare_engine": True})) as engine:
        await engine.wait_ready()
        first = engine.models
        process, spare = await until(two_engines)
        process.kill()
        await replaced(engine)
        assert engines()[0] == spare
        assert engine.models == first, "the same function of the same weights"
        assert isinstance(await submit(engine, SHORT).result(), Inverted)
        _, second_spare = await until(two_engines)
        second_spare.kill()
        _, third_spare = await until(lambda: (found := two_engines()) and found[1] != second_spare and found)
        assert engine.state is EngineState.READY
        third_spare.suspend()
    assert not engines()


async def test_a_model_that_cannot_be_loaded_says_why() -> None:
    handle = Dispatcher(Settings(models="mine=/nowhere/at/all"), Metrics())
    await handle.start()
    with pytest.raises(ModelNotReady, match="allow-network"):
        await handle.wait_ready()
    assert handle.state is EngineState.FAILED
    await handle.close()


def test_a_front_that_fails_without_closing_its_engine_ends_all_the_same() -> None:
    code = """
import asyncio
from underpaint_server.dispatch.queue import Dispatcher
from underpaint_server.settings import Settings
from underpaint_server.telemetry import Metrics

async def fail():
    engine = Dispatcher(Settings(models="toy=toy:"), Metrics())
    await engine.start()
    await engine.wait_ready()
    raise ValueError("a fault")

if __name__ == "__main__":
    asyncio.run(fail())
"""
    command = (sys.executable, "-c", code)
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert ended.returncode == 1
    assert "a fault" in ended.stderr
