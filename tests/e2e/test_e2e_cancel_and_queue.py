"""One job at a time: who waits, who gives up, who comes first, who is refused."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from e2e.harness import (
    ENDLESS,
    Samples,
    disc,
    eventually,
    idle,
    masking,
    queued,
    result,
    running,
    scrape,
    stubs,
    until,
)
from support.front import edit, encoded, refused
from support.waiting import PATIENCE_S
from underpaint import AsyncClient, Client, DiffEdit, Phase, Progress, SdEdit, errors
from underpaint.v1 import types_pb2
from underpaint_server.local_server import LocalServer

DROPPED_CLIENT = """
import sys
from underpaint import Client, DiffEdit
print("started", flush=True)
with Client(sys.argv[1]) as client:
    client.edit(sys.stdin.buffer.read(), "a corgi", DiffEdit(samples=int(sys.argv[2])))
"""


async def test_a_cancelled_call_frees_its_place_for_the_next(narrow: LocalServer) -> None:
    before = await idle(narrow)
    async with stubs(narrow) as wire, running(wire, masking()) as endless:
        waiting = await queued(wire, edit("sdedit"))
        assert scrape(narrow).sum("underpaint_num_requests_running") == 1
        endless.cancel()
        assert (await result(waiting)).image.content
    after = await idle(narrow)
    assert _cancelled(after, "running") == _cancelled(before, "running") + 1
    latency = "underpaint_cancel_latency_seconds_count"
    assert after.sum(latency) == before.sum(latency) + 1


async def test_a_call_cancelled_in_the_queue_never_runs(narrow: LocalServer) -> None:
    before = await idle(narrow)
    async with stubs(narrow) as wire, running(wire, masking()):
        waiting = await queued(wire, edit("sdedit"))
        assert scrape(narrow).sum("underpaint_num_requests_waiting", priority="normal") == 1
        waiting.cancel()
        await eventually(lambda: scrape(narrow).sum("underpaint_num_requests_waiting") == 0)
    after = await idle(narrow)
    assert _cancelled(after, "queued") == _cancelled(before, "queued") + 1
    rows = "underpaint_network_rows_total"
    assert after.sum(rows, method="sdedit") == before.sum(rows, method="sdedit")


async def test_a_client_that_dies_leaves_nothing_running(narrow: LocalServer) -> None:
    before = await idle(narrow)
    arguments = (sys.executable, "-c", DROPPED_CLIENT, narrow.target, str(ENDLESS))
    client = await asyncio.create_subprocess_exec(*arguments, stdin=PIPE, stdout=PIPE)
    assert client.stdin is not None
    client.stdin.write(encoded(disc()))
    client.stdin.close()
    await eventually(lambda: scrape(narrow).sum("underpaint_num_requests_running") == 1)
    os.kill(client.pid, signal.SIGKILL)
    await client.wait()
    after = await idle(narrow)
    assert _cancelled(after, "running") == _cancelled(before, "running") + 1


async def test_a_cancelled_task_of_the_async_client_cancels_the_work(narrow: LocalServer) -> None:
    await idle(narrow)
    async with AsyncClient(narrow.target) as client:
        begun = asyncio.Event()

        def follow(now: Progress) -> None:
            if now.phase is not Phase.QUEUED:
                begun.set()

        task = asyncio.create_task(client.edit(disc(), "a corgi", DiffEdit(samples=ENDLESS), progress=follow))
        await asyncio.wait_for(begun.wait(), PATIENCE_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await client.edit(disc(), "a corgi", DiffEdit(samples=1))).image_bytes
    await idle(narrow)


async def test_a_deadline_that_passes_ends_the_call_and_the_work(narrow: LocalServer) -> None:
    before = await idle(narrow)
    async with stubs(narrow) as wire, running(wire, masking()):
        # Behind work without an end, with an estimate that lets it in: the running job is not counted against it. The
        # time is for a busy machine, which must admit both calls before it has passed.
        async with AsyncClient(narrow.target) as client:
            answers: Sequence[Any] = await asyncio.gather(
                wire.edits.Edit(edit("sdedit"), timeout=10),
                client.edit(disc(), "a corgi", timeout=10),
                return_exceptions=True,
            )
        stock, ours = answers
        assert isinstance(stock, grpc.aio.AioRpcError)
        assert stock.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert isinstance(ours, errors.DeadlinePassed)
        await eventually(lambda: scrape(narrow).sum("underpaint_num_requests_waiting") == 0)
    after = await idle(narrow)
    code = {"code": "DEADLINE_EXCEEDED", "reason": "DEADLINE_PASSED"}
    total = "underpaint_requests_total"
    assert after.sum(total, **code) == before.sum(total, **code) + 2
    missed = "underpaint_deadline_misses_total"
    assert after.sum(missed, stage="queued") == before.sum(missed, stage="queued") + 2
    assert _cancelled(after, "queued") == _cancelled(before, "queued")


async def test_what_cannot_meet_its_deadline_is_refused_with_the_estimate(narrow: LocalServer) -> None:
    await idle(narrow)
    async with stubs(narrow) as wire:
        await wire.edits.Edit(masking(200))  # now the pace is known
        before = await idle(narrow)
        refusal = await refused(wire.edits.Edit(masking(100 * ENDLESS), timeout=30))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_UNATTAINABLE")
    assert float(refusal.metadata["estimate_s"]) > 30
    after = await idle(narrow)
    missed = "underpaint_deadline_misses_total"
    at_admission = {"method": "diffedit", "stage": "at_admission"}
    assert after.sum(missed, **at_admission) == before.sum(missed, **at_admission) + 1
    assert after.sum("underpaint_network_rows_total") == before.sum("underpaint_network_rows_total")


async def test_a_full_queue_refuses_with_the_time_to_come_back(narrow: LocalServer) -> None:
    await idle(narrow)
    async with stubs(narrow) as wire, running(wire, masking()):
        waiting = [await queued(wire, edit("sdedit")) for _ in range(3)]
        assert scrape(narrow).sum("underpaint_queue_capacity") == 3
        refusal = await refused(wire.edits.Edit(edit("sdedit")))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL")
        delay_ms = refusal.details["RetryInfo"].retry_delay.ToMilliseconds()
        assert 0 < delay_ms <= 30_000
        assert abs(int(refusal.trailers["grpc-retry-pushback-ms"]) - delay_ms) <= 1
        waiting[0].cancel()
        await eventually(lambda: scrape(narrow).sum("underpaint_num_requests_waiting") == 2)
        waiting[0] = await queued(wire, edit("sdedit"))  # a place is free, so it is taken
        for call in waiting:
            call.cancel()
    await idle(narrow)


PRIORITIES = {name: types_pb2.Priority.Value(f"PRIORITY_{name.upper()}") for name in ("batch", "normal", "interactive")}


@pytest.mark.parametrize("flood", PRIORITIES)
async def test_no_flood_of_one_priority_locks_out_another(narrow: LocalServer, flood: str) -> None:
    """Not while its jobs take all their places in the engine and all in the queue, whether it is above or below."""
    await idle(narrow)
    mine = {"priority": PRIORITIES[flood]}
    async with stubs(narrow) as wire, running(wire, masking(**mine)):
        waiting = [await queued(wire, edit("sdedit", **mine)) for _ in range(3)]
        for place, call in enumerate(waiting, 1):
            await until(call, _stands_at(place))
        by_priority = scrape(narrow).by("underpaint_num_requests_waiting", "priority")
        assert by_priority == dict.fromkeys(by_priority, 0) | {flood: 3}
        assert (await refused(wire.edits.Edit(edit("sdedit", **mine)))).reason == "QUEUE_FULL"
        for other in PRIORITIES.keys() - {flood}:
            short = edit("sdedit", sdedit={"steps": 2}, priority=PRIORITIES[other])
            answer = await wire.edits.Edit(short, timeout=PATIENCE_S)
            assert answer.resolved.priority == PRIORITIES[other]
        for call in waiting:
            call.cancel()
    await idle(narrow)


async def test_progress_is_told_in_the_middle_of_one_long_group_of_rows(narrow: LocalServer) -> None:
    await idle(narrow)
    async with stubs(narrow) as wire, running(wire, masking()) as endless:
        seen = [(await until(endless, _masks_beyond(share))).progress.fraction for share in (0.0, 0.001, 0.002)]
    assert 0 < seen[0] < seen[1] < seen[2] < 1
    await idle(narrow)


def _masks_beyond(share: float) -> Any:
    return lambda event: event.progress.phase == types_pb2.PHASE_MASKING and event.progress.fraction > share


def _stands_at(place: int) -> Any:
    def wanted(event: Any) -> bool:
        progress = event.progress
        return bool(progress.phase == types_pb2.PHASE_QUEUED and progress.queue_position == place)

    return wanted


def _cancelled(now: Samples, stage: str) -> float:
    method = "diffedit" if stage == "running" else "sdedit"
    return now.sum("underpaint_cancellations_total", method=method, stage=stage)


@pytest.mark.parametrize("concurrency", [4, 24, 150])
def test_a_folder_of_photos_on_a_queue_of_three_is_edited_whole(narrow: LocalServer, concurrency: int) -> None:
    """By default fewer than a server's queue holds are asked at once; more than it holds wait for their place."""
    photos = [encoded(disc((index, 40, 40))) for index in range(150)]
    with Client(narrow.target, timeout=PATIENCE_S) as client:
        results = list(client.edit_many(photos, "a corgi", SdEdit(steps=2), concurrency=concurrency, seed=1))
    assert len({edited.image_bytes for edited in results}) > 1
    assert len(results) == 150
