"""The front's side of the engine, with a real engine process behind it."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
from support.jobs import disc, edict_options, edit_job, invert_job, learn_job
from support.waiting import PATIENCE_S, until
from underpaint_server.backends.toy import SCALE, SHAPE, ToyBackend
from underpaint_server.dispatch.queue import Dispatcher
from underpaint_server.dispatch.supervisor import EngineState
from underpaint_server.engine.worker import CAPS_FILE
from underpaint_server.errors import (
    Cancelled,
    DeadlinePassed,
    DeadlineUnattainable,
    Draining,
    ModelLoading,
    QueueFull,
    WorkerRestarted,
)
from underpaint_server.jobs import Descent, Generated, Inverted, Job, Phase, Photo, Priority
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.settings import Settings
from underpaint_server.telemetry import Metrics

PX = SHAPE[1] * SCALE
METRICS = Metrics()
SETTINGS = Settings(models="toy=toy:", max_running=2, queue_capacity=2)
LONG = invert_job("toy", PX, edict_options(1000))
ENDLESS = learn_job("toy", PX, method=Descent(1_000_000, 0.05), iterations=1_000_000)
SHORT = invert_job("toy", PX, edict_options(10))


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def started() -> AsyncIterator[Dispatcher]:
    handle = Dispatcher(SETTINGS, METRICS)
    await handle.start()
    await handle.wait_ready()
    yield handle
    await handle.close()


engine = pytest_asyncio.fixture(started, scope="module", loop_scope="module", name="engine")
"""One for all tests that leave it as it was; starting a process takes seconds."""

fresh = pytest_asyncio.fixture(started, loop_scope="module", name="fresh")
"""One for a test that ends it."""


def submit(engine: Dispatcher, job: Job, priority: Priority = Priority.NORMAL, deadline_s: float | None = None) -> Any:
    return engine.submit(job, priority=priority, deadline_s=deadline_s)


def child() -> psutil.Process:
    """The youngest engine process."""
    spawned = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
    return max(spawned, key=psutil.Process.create_time)


async def test_work_goes_through(engine: Dispatcher) -> None:
    begun = time.time()
    result = await submit(engine, SHORT).result()
    assert isinstance(result, Inverted)
    assert list(engine.models) == list(engine.configured) == ["toy"]
    assert engine.num_running == 0
    assert engine.last_pass_at is not None
    assert begun <= engine.last_pass_at <= time.time()


async def test_before_the_models_are_loaded_callers_are_told_when_to_come_back() -> None:
    handle = Dispatcher(SETTINGS, METRICS)
    await handle.start()
    with pytest.raises(ModelLoading) as caught:
        submit(handle, SHORT)
    assert (caught.value.retry_after_s or 0) > 0
    await handle.close()


async def test_the_queue_is_bounded_ordered_and_knows_its_places(engine: Dispatcher) -> None:
    await submit(engine, SHORT).result()  # so that it is known what a row costs
    running = [submit(engine, LONG), submit(engine, LONG)]
    longer, shorter = submit(engine, LONG), submit(engine, SHORT)
    assert [job.queue_position for job in (*running, shorter, longer)] == [0, 0, 1, 2]
    with pytest.raises(QueueFull) as caught:
        submit(engine, SHORT)
    assert (caught.value.retry_after_s or 0) > 0
    assert engine.num_waiting(Priority.NORMAL) == 2
    running[0].cancel()
    await shorter.result()
    longer.cancel()
    running[1].cancel()
    with pytest.raises(Cancelled):
        await running[0].result()
    await until(lambda: engine.num_running == 0)


async def test_a_deadline_of_its_own_moves_a_job_ahead_in_the_queue(engine: Dispatcher) -> None:
    await submit(engine, SHORT).result()
    process = child()
    process.suspend()
    try:
        jobs = [submit(engine, LONG), submit(engine, LONG), submit(engine, LONG)]
        urgent = submit(engine, LONG, deadline_s=0.6 * engine.backlog_s)
        assert [job.queue_position for job in (*jobs, urgent)] == [0, 0, 2, 1]
        for job in (*jobs, urgent):
            job.cancel()
    finally:
        process.resume()
    await until(lambda: engine.num_running == 0)


@pytest.mark.parametrize("flood", [Priority.BATCH, Priority.NORMAL])
async def test_no_flood_of_one_priority_takes_the_places_of_another(engine: Dispatcher, flood: Priority) -> None:
    """Neither in the engine nor in the queue; whether the flood is below or above."""
    process = child()
    process.suspend()
    try:
        jobs = [submit(engine, ENDLESS, flood) for _ in range(4)]
        with pytest.raises(QueueFull):
            submit(engine, ENDLESS, flood)
        others = [submit(engine, SHORT, priority) for priority in Priority if priority is not flood]
        assert [job.queue_position for job in others] == [0, 0, 0]
    finally:
        process.resume()
    for job in others:
        assert isinstance(await job.result(), Inverted), "the flood is still there"
    assert engine.num_running == 2
    for job in jobs:
        job.cancel()
    await until(lambda: engine.num_running == 0)


async def test_the_backlog_counts_large_images_as_what_they_cost(engine: Dispatcher) -> None:
    small, large = (
        edit_job("toy", PX, SdEdit(1.0, 100), Generated("a dog", 1, side, side, 100)) for side in (PX, 32 * PX)
    )
    for job in (small, large):  # so that both sizes were measured
        await submit(engine, job).result()
    seconds = []
    for job in (small, large):
        process = child()
        process.suspend()
        try:
            handle = submit(engine, job)
            seconds.append(engine.backlog_s)
            handle.cancel()
        finally:
            process.resume()
        await until(lambda: engine.num_running == 0)
    assert seconds[1] > 2 * seconds[0] > 0


async def test_learning_takes_no_place_and_needs_none(engine: Dispatcher) -> None:
    endless = learn_job("toy", PX, method=Descent(200, 0.05), iterations=200)
    learning = [submit(engine, endless, Priority.LEARNING) for _ in range(3)]
    running = [submit(engine, LONG), submit(engine, LONG)]
    late = submit(engine, endless, Priority.LEARNING)
    waiting = submit(engine, SHORT)
    assert [job.queue_position for job in (*learning, *running, late, waiting)] == [0, 0, 0, 0, 0, 0, 1]
    for job in (*learning, *running, late):
        job.cancel()
    assert isinstance(await waiting.result(), Inverted)


async def test_a_crash_costs_the_jobs_inside_and_no_others(engine: Dispatcher) -> None:
    inside, waiting = [submit(engine, LONG), submit(engine, LONG)], submit(engine, SHORT)
    await until(lambda: inside[0].progress.phase is not Phase.QUEUED)
    child().kill()
    for job in inside:
        with pytest.raises(WorkerRestarted):
            await job.result()
    with pytest.raises(WorkerRestarted):
        submit(engine, SHORT)
    assert engine.state is EngineState.RESTARTING
    assert isinstance(await waiting.result(), Inverted)


async def test_learned_sizes_of_passes_outlive_the_engine_process_and_the_server(tmp_path: Path) -> None:
    """A server that starts with what another has learned, for images larger than the model's."""
    settings = SETTINGS.model_copy(update={"cache_dir": str(tmp_path)})
    info = ToyBackend("toy", settings).facts.info
    name = f"{info.digest[:16]}-{info.fingerprint[:16]} denoise 4x16x16"
    known = {name: {"rows": 3, "wait": 64, "limit": settings.max_batch_size}}
    (tmp_path / CAPS_FILE).write_text(json.dumps(known))
    server = Dispatcher(settings, METRICS)
    await server.start()
    try:
        for _ in range(2):
            await server.wait_ready()
            server._caps.clear()
            for px in (PX, 2 * PX):
                await submit(server, invert_job("toy", px, edict_options(10))).result()
            assert server.max_batch_sizes == {("toy", "denoise", "own"): 16, ("toy", "denoise", "larger"): 3}
            child().kill()
            await until(lambda: server.state is EngineState.RESTARTING)
    finally:
        await server.close()


async def test_an_engine_that_does_not_read_never_stops_the_front(engine: Dispatcher) -> None:
    process = child()
    big = edit_job("toy", PX, SdEdit(0.5, 5), Photo(disc(1024)))
    process.send_signal(signal.SIGSTOP)
    try:
        job = submit(engine, big)  # larger than any pipe's buffer
        await asyncio.sleep(0)  # the loop goes on
        assert not job.done
    finally:
        process.send_signal(signal.SIGCONT)
    assert (await job.result()).pixels.shape == (1024, 1024, 3)


async def test_deadlines_are_held_in_the_queue_and_in_the_engine(fresh: Dispatcher) -> None:
    """On an engine whose pace is not known yet: on a busy machine it would refuse what is so short of time."""
    process = child()
    process.suspend()  # so that nothing is done before its deadline, however fast the machine is
    running = [submit(fresh, LONG, deadline_s=0.2), submit(fresh, LONG)]
    waiting = submit(fresh, SHORT, deadline_s=0.05)
    with pytest.raises(DeadlinePassed):
        await waiting.result()
    assert running[0].deadline is not None
    await asyncio.sleep(max(0.0, running[0].deadline - time.monotonic()))
    process.resume()
    with pytest.raises(DeadlinePassed):
        await running[0].result()
    running[1].cancel()


@pytest.mark.parametrize("late", [True, False])
async def test_a_call_that_is_cancelled_counts_as_late_from_its_deadline_on(engine: Dispatcher, late: bool) -> None:
    """GRPC cancels a call whose deadline passes, before anything else can see that it did."""
    before = {stage: counted(stage) for stage in ("queued", "running")}
    process = child()
    process.suspend()
    try:
        jobs = [submit(engine, ENDLESS, Priority.LEARNING, 3600)]
        jobs += [submit(engine, LONG, deadline_s=3600) for _ in range(3)]  # the last of them waits
        for job in jobs:
            job.deadline = time.monotonic() + (0 if late else 3600)
            job.cancel()
    finally:
        process.resume()
    await until(lambda: engine.num_running == 0)
    after = {stage: counted(stage) for stage in ("queued", "running")}
    for stage, jobs_there in (("queued", 1), ("running", 3)):
        missed, cancelled = (now - then for now, then in zip(after[stage], before[stage], strict=True))
        assert (missed, cancelled) == ((jobs_there, 0) if late else (0, jobs_there))


def counted(stage: str) -> tuple[float, float]:
    """Missed deadlines and cancellations of a stage, of all methods."""
    names = ("underpaint_deadline_misses_total", "underpaint_cancellations_total")
    samples = [sample for family in METRICS.registry.collect() for sample in family.samples]
    missed, cancelled = (
        sum(s.value for s in samples if s.name == name and s.labels["stage"] == stage) for name in names
    )
    return missed, cancelled


async def test_an_impossible_deadline_is_refused_after_any_idle_time(
    engine: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    await submit(engine, SHORT).result()
    monkeypatch.setattr(engine, "_clock", lambda: time.monotonic() + 3600)  # an hour later, nothing was done
    with pytest.raises(DeadlineUnattainable) as caught:
        submit(engine, LONG, deadline_s=1e-4)
    assert float(caught.value.metadata["estimate_s"]) > 1e-4
    monkeypatch.undo()
    possible = submit(engine, SHORT, deadline_s=3600)
    assert isinstance(await possible.result(), Inverted)


async def test_an_impossible_deadline_is_refused_after_a_restart_of_the_engine(engine: Dispatcher) -> None:
    await submit(engine, SHORT).result()
    child().kill()
    await until(lambda: engine.state is EngineState.RESTARTING)
    await engine.wait_ready()
    with pytest.raises(DeadlineUnattainable):
        submit(engine, LONG, deadline_s=1e-4)


async def test_only_jobs_that_must_end_first_count_against_a_deadline(fresh: Dispatcher) -> None:
    """Beside jobs that only begin before it, a job may be done in time; behind those that must end, it is not."""
    for _ in range(3):
        await submit(fresh, SHORT).result()
    process = child()
    process.suspend()
    try:
        running = [submit(fresh, SHORT), submit(fresh, SHORT)]
        first = submit(fresh, SHORT)
        enough_s = 1.5 * estimate_s(fresh, SHORT)
        second = submit(fresh, SHORT, deadline_s=enough_s)
        assert second.queue_position > 0
        for job in (*running, first, second):
            job.cancel()
    finally:
        process.resume()
    await until(lambda: fresh.num_running == 0)


def estimate_s(engine: Dispatcher, job: Job) -> float:
    """What a job alone needs at least, as its refusal says."""
    with pytest.raises(DeadlineUnattainable) as caught:
        submit(engine, job, Priority.INTERACTIVE, deadline_s=1e-6)
    return float(caught.value.metadata["estimate_s"])


async def test_a_later_deadline_counts_for_everybody_who_waits(fresh: Dispatcher) -> None:
    for deadline_s in (1, 4, 16, 64):  # a slow machine needs more time to hear of the later one
        job = submit(fresh, LONG, deadline_s=deadline_s)
        first = job.deadline
        assert first is not None
        job.extend(first - 0.1)  # earlier: nothing changes
        assert job.deadline == first
        job.extend(None)
        await submit(fresh, SHORT).result()  # so the engine has read the orders before this one
        if time.monotonic() < first:
            break
        job.cancel()
    process = child()
    process.suspend()  # the job outlasts its first deadline, however fast the machine is
    await asyncio.sleep(max(0.0, first - time.monotonic()))
    process.resume()
    assert isinstance(await job.result(), Inverted)


async def test_what_cannot_be_done_in_time_is_refused_with_the_estimate(engine: Dispatcher) -> None:
    await submit(engine, SHORT).result()
    with pytest.raises(DeadlineUnattainable) as caught:
        submit(engine, LONG, deadline_s=1e-4)
    assert float(caught.value.metadata["estimate_s"]) > 1e-4
    assert engine.num_running == 0


async def test_draining_finishes_what_there_is_and_takes_nothing_new(fresh: Dispatcher) -> None:
    job = submit(fresh, SHORT)
    drain = asyncio.create_task(fresh.drain(PATIENCE_S))
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        submit(fresh, SHORT)
    await drain
    assert isinstance(await job.result(), Inverted)


async def test_draining_ends_what_takes_too_long(fresh: Dispatcher) -> None:
    job = submit(fresh, LONG)
    await fresh.drain(0.05)
    with pytest.raises(Draining):
        await job.result()


async def test_several_readers_see_progress_that_never_falls(engine: Dispatcher) -> None:
    job = submit(engine, invert_job("toy", PX, edict_options(200)))

    async def fractions() -> list[float]:
        return [event.fraction async for event in job.events()]

    for seen in await asyncio.gather(fractions(), fractions()):
        assert seen
        assert seen == sorted(seen)


async def test_jobs_leave_nothing_behind(engine: Dispatcher) -> None:
    results = [await submit(engine, SHORT).result() for _ in range(20)]
    first = results[0].inversion.arrays["x"]
    assert all(np.array_equal(first, other.inversion.arrays["x"]) for other in results)
    assert engine.num_running == 0
    assert engine.backlog_s == 0
