"""Progress, previews, and how a call ends before its time."""

import asyncio
import threading
import time
from typing import Any

import grpc
import pytest
from support.waiting import PATIENCE_S
from underpaint import AsyncClient, Client, Phase, errors
from underpaint.v1 import edit_service_pb2, types_pb2


def test_without_a_listener_the_unary_call_is_made(client, server, photo):
    client.edit(photo, "t")
    client.invert(photo)
    assert [name for name, _ in server.requests] == ["Edit", "Invert"]


def test_events_arrive_in_order(client, server, photo):
    seen: list[Any] = []
    result = client.edit(photo, "t", progress=seen.append, on_preview=seen.append, preview_every=2)
    kinds = [type(each).__name__ for each in seen]
    assert kinds == ["Progress"] * 3 + ["Preview"] + ["Progress"] * 2 + ["Preview"]
    first, *_, last = [each for each in seen if type(each).__name__ == "Progress"]
    assert (first.phase, first.queue_position, first.eta_s) == (Phase.QUEUED, 3, None)
    assert (last.phase, last.step, last.total_steps, last.fraction, last.eta_s) == (Phase.DENOISING, 4, 4, 1.0, 0.0)
    assert [each.step for each in seen if type(each).__name__ == "Preview"] == [2, 4]
    assert seen[3].image.size == (8, 8)
    assert result.image.size == (8, 8)


def test_a_preview_listener_alone_gets_every_fifth_step(client, server, photo):
    seen: list[Any] = []
    client.edit(photo, "t", on_preview=seen.append)
    assert server.named("StreamEdit")[0].preview_every == 5


def test_progress_alone_asks_for_no_previews(client, server, photo):
    client.edit(photo, "t", progress=[].append)
    assert server.named("StreamEdit")[0].preview_every == 0


def test_inverting_reports_too(client, photo):
    seen: list[Any] = []
    inversion = client.invert(photo, progress=seen.append)
    assert [(each.phase, each.step) for each in seen] == [(Phase.INVERTING, 1), (Phase.INVERTING, 2)]
    assert inversion.width == 64


def test_snapshots_may_be_skipped(client, server, photo):
    def terse(request, context):
        yield edit_service_pb2.StreamEditResponse(result=server._edit(request.edit, context))

    seen: list[Any] = []
    server.script("StreamEdit", terse)
    client.edit(photo, "t", progress=seen.append)
    assert seen == []


def test_a_bar_is_drawn_for_true_and_silent_without_a_terminal(client, photo, capfd):
    assert client.edit(photo, "t", progress=True).image.size == (8, 8)
    assert client.invert(photo, progress=True).width == 64
    assert capfd.readouterr() == ("", "")


def test_a_stream_without_a_result_is_the_servers_fault(client, server, photo):
    server.script("StreamEdit", lambda request, context: iter(()))
    with pytest.raises(errors.ServerError, match="without a result"):
        client.edit(photo, "t", progress=[].append)


def test_an_error_in_the_middle_of_a_stream_is_typed(client, server, photo, refusal):
    def breaks(request, context):
        yield edit_service_pb2.StreamEditResponse(accepted=edit_service_pb2.Accepted())
        refusal(grpc.StatusCode.INTERNAL, "NON_FINITE_LATENTS")(request, context)

    server.script("StreamEdit", breaks)
    with pytest.raises(errors.NonFiniteLatents):
        client.edit(photo, "t", progress=[].append)
    assert len(server.named("StreamEdit")) == 1


def _endless(server):
    def work(request, context):
        context.add_callback(server.cancelled.set)
        step = 0
        while not server.cancelled.is_set():
            step += 1
            progress = types_pb2.Progress(phase=types_pb2.PHASE_DENOISING, step=step)
            yield edit_service_pb2.StreamEditResponse(progress=progress)
            time.sleep(0.01)

    return work


def test_a_listener_that_raises_cancels_the_work(client, server, photo):
    server.script("StreamEdit", _endless(server))

    def listener(progress):
        if progress.step == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        client.edit(photo, "t", progress=listener)
    assert server.cancelled.wait(PATIENCE_S)


def test_cancelling_a_task_cancels_the_work(server, photo):
    server.script("StreamEdit", _endless(server))

    async def abandon():
        begun = asyncio.Event()
        async with AsyncClient(server.target) as client:
            task = asyncio.create_task(client.edit(photo, "t", progress=lambda progress: begun.set()))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(server.cancelled.wait, PATIENCE_S)

    asyncio.run(abandon())
    assert server.cancelled.is_set()


def test_cancelling_a_unary_call_cancels_the_work(server, photo):
    begun = threading.Event()

    def work(request, context):
        context.add_callback(server.cancelled.set)
        begun.set()
        server.cancelled.wait(PATIENCE_S)
        return edit_service_pb2.EditResponse()

    server.script("Edit", work)

    async def abandon():
        async with AsyncClient(server.target) as client:
            task = asyncio.create_task(client.edit(photo, "t"))
            await asyncio.to_thread(begun.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(server.cancelled.wait, PATIENCE_S)

    asyncio.run(abandon())
    assert server.cancelled.is_set()


def test_closing_ends_what_runs(server, photo):
    server.script("StreamEdit", _endless(server))
    client = Client(server.target)
    with pytest.raises(errors.Cancelled):
        client.edit(photo, "t", progress=lambda progress: client.close())
    assert server.cancelled.wait(PATIENCE_S)
    assert client.models()  # the next call opens another connection
    client.close()


def test_a_listener_may_be_a_coroutine_function(server, photo):
    seen: list[Any] = []

    async def listener(progress):
        await asyncio.sleep(0)
        seen.append(progress.step)

    async def edit():
        async with AsyncClient(server.target) as client:
            await client.edit(photo, "t", progress=listener)

    asyncio.run(edit())
    assert seen == [0, 1, 2, 3, 4]


def test_many_edits_at_once_share_a_client(server, photo):
    async def edit_all():
        async with AsyncClient(server.target) as client:
            return await asyncio.gather(*(client.edit(photo, f"t{index}", seed=index) for index in range(20)))

    results = asyncio.run(edit_all())
    assert [result.resolved.seed for result in results] == list(range(20))
    assert [result.resolved.message.target_prompt for result in results] == [f"t{index}" for index in range(20)]


def test_an_async_client_moves_to_the_next_event_loop(server, photo):
    client = AsyncClient(server.target)

    async def once():
        result = await client.edit(photo, "t")
        await client.close()
        return result

    assert asyncio.run(once()).image_bytes == asyncio.run(once()).image_bytes
