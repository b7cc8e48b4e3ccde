"""A repeated request id never computes twice, and a job lives as long as somebody waits for it."""

import asyncio
import gc
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import grpc
import pytest
from support.front import Wire, edit, photo, refused
from underpaint.v1 import edit_service_pb2, inversion_service_pb2
from underpaint_server.errors import FieldInvalid, QueueFull, RequestIdReused
from underpaint_server.rpc.flights import Flight
from underpaint_server.rpc.replay import Replay, fingerprint
from underpaint_server.telemetry import Metrics


async def until(true: Callable[[], Any]) -> None:
    while not true():
        await asyncio.sleep(0.001)


async def test_a_repeat_gets_the_first_answer(wire: Wire) -> None:
    request = edit(request_id=str(uuid4()))
    first = await wire.edits.Edit(request)
    assert await wire.edits.Edit(request) == first
    assert len(wire.engine.jobs) == 1
    assert wire.metric("underpaint_idempotent_replays_total", result="replayed") == 1


async def test_without_an_id_nothing_is_a_repeat(wire: Wire) -> None:
    await wire.edits.Edit(edit("sdedit", seed=1))
    await wire.edits.Edit(edit("sdedit", seed=1))
    assert len(wire.engine.jobs) == 2


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_repeat_joins_the_running_request(wire: Wire, streamed: bool) -> None:
    wire.engine.held = True
    request = edit(request_id=str(uuid4()))
    first = wire.edits.Edit(request)
    await wire.engine.submitted.wait()
    if streamed:
        stream = wire.edits.StreamEdit(edit_service_pb2.StreamEditRequest(edit=request))
        assert (await stream.read()).accepted.request_id == request.request_id
        wire.engine.finish(wire.engine.handles[0])
        while (event := await stream.read()).WhichOneof("event") != "result":
            pass
        assert event.result == await first
    else:
        second = wire.edits.Edit(request)
        await until(lambda: wire.metric("underpaint_idempotent_replays_total", result="joined") == 1)
        wire.engine.finish(wire.engine.handles[0])
        assert await first == await second
    assert len(wire.engine.jobs) == 1


async def test_a_replayed_stream_has_its_result_at_once(wire: Wire) -> None:
    request = edit(request_id=str(uuid4()))
    first = await wire.edits.Edit(request)
    stream = wire.edits.StreamEdit(edit_service_pb2.StreamEditRequest(edit=request))
    events = [event async for event in stream]
    assert [event.WhichOneof("event") for event in events] == ["accepted", "result"]
    assert events[-1].result == first


async def test_the_job_is_cancelled_when_its_last_caller_leaves_and_not_before(wire: Wire) -> None:
    wire.engine.held = True
    request = edit(request_id=str(uuid4()))
    first, second = wire.edits.Edit(request), wire.edits.Edit(request)
    await until(lambda: wire.metric("underpaint_idempotent_replays_total", result="joined") == 1)
    await wire.engine.submitted.wait()
    first.cancel()
    await until(lambda: wire.metric("grpc_server_handled_total", grpc_type="unary", grpc_code="CANCELLED",
                                    grpc_service="underpaint.v1.EditService", grpc_method="Edit") == 1)  # fmt: skip
    assert wire.engine.cancelled == []
    second.cancel()
    await until(lambda: wire.engine.cancelled)
    assert wire.engine.cancelled == wire.engine.handles


async def test_an_abandoned_request_starts_anew_under_its_id(wire: Wire) -> None:
    wire.engine.held = True
    request = edit(request_id=str(uuid4()))
    call = wire.edits.Edit(request)
    await wire.engine.submitted.wait()
    call.cancel()
    await until(lambda: wire.engine.cancelled)
    wire.engine.held = False
    await wire.edits.Edit(request)
    assert len(wire.engine.jobs) == 2


async def test_a_refusal_is_not_replayed(wire: Wire) -> None:
    wire.engine.refusals = [QueueFull("full")]
    request = edit(request_id=str(uuid4()))
    assert (await refused(wire.edits.Edit(request))).reason == "QUEUE_FULL"
    await wire.edits.Edit(request)
    assert len(wire.engine.jobs) == 1


async def test_an_id_belongs_to_its_rpc(wire: Wire) -> None:
    request_id = str(uuid4())
    await wire.edits.Edit(edit(request_id=request_id))
    ddim = inversion_service_pb2.InversionParameters(ddim=inversion_service_pb2.DdimInversion())
    invert = inversion_service_pb2.InvertRequest(request_id=request_id, image=photo(), parameters=ddim)
    assert (await refused(wire.inversions.Invert(invert))).reason == "REQUEST_ID_REUSED"


# --- the table itself -------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def table(max_bytes: int = 10_000) -> tuple[Replay, Clock]:
    clock = Clock()
    return Replay(ttl_s=60, max_bytes=max_bytes, metrics=Metrics(), clock=clock), clock


async def fly(replay: Replay, request_id: str, print_: bytes = b"p", bytes_: int = 100) -> tuple[Any, bool]:
    """The answer, and whether it was computed just now."""
    ran = False

    async def run(flight: Flight[Any]) -> edit_service_pb2.EditResponse:
        nonlocal ran
        ran = True
        return edit_service_pb2.EditResponse(inversion="x" * bytes_)

    with replay.board(request_id, print_, run) as flight:
        return await flight.result(), ran


async def test_answers_are_kept_for_their_time_only() -> None:
    replay, clock = table()
    request_id = str(uuid4())
    assert (await fly(replay, request_id))[1]
    clock.now = 59.9
    assert not (await fly(replay, request_id))[1]
    clock.now = 60.0
    assert (await fly(replay, request_id, b"another"))[1]


async def test_answers_are_kept_within_their_bytes_the_oldest_go_first() -> None:
    replay, _ = table(max_bytes=350)
    ids = [str(uuid4()) for _ in range(4)]
    for request_id in ids:
        await fly(replay, request_id)
    assert [not (await fly(replay, request_id))[1] for request_id in reversed(ids)] == [True, True, True, False]


async def test_an_answer_larger_than_all_bytes_is_not_kept() -> None:
    replay, _ = table(max_bytes=50)
    request_id = str(uuid4())
    assert [(await fly(replay, request_id))[1] for _ in range(2)] == [True, True]


@pytest.mark.parametrize("request_id", ["x", "00000000-0000-1000-8000-000000000000", " "])
async def test_ids_are_uuid4(request_id: str) -> None:
    with pytest.raises(FieldInvalid, match="request_id"):
        await fly(table()[0], request_id)


async def test_another_payload_is_refused_while_running_and_after() -> None:
    replay, _ = table()
    request_id, release = str(uuid4()), asyncio.Event()

    async def run(flight: Flight[Any]) -> edit_service_pb2.EditResponse:
        await release.wait()
        return edit_service_pb2.EditResponse()

    with replay.board(request_id, b"p", run) as flight:
        with pytest.raises(RequestIdReused):
            replay.board(request_id, b"q", run)
        release.set()
        await flight.result()
    with pytest.raises(RequestIdReused):
        replay.board(request_id, b"q", run)


def test_a_fingerprint_tells_requests_and_rpcs_apart() -> None:
    prints = {fingerprint("edit", edit()), fingerprint("mask", edit()), fingerprint("edit", edit(seed=0))}
    assert len(prints) == 3
    assert fingerprint("edit", edit()) in prints


async def test_an_error_after_the_last_caller_left_goes_nowhere() -> None:
    """No "exception was never retrieved" from the loop."""
    heard: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    ended = asyncio.Event()

    async def run(flight: Flight[Any]) -> edit_service_pb2.EditResponse:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.set()
            raise QueueFull("too late") from None
        raise AssertionError

    with Flight(run):
        await asyncio.sleep(0)
    await ended.wait()
    await asyncio.sleep(0)
    gc.collect()
    await asyncio.sleep(0)
    assert heard == []


async def test_a_flight_nobody_waits_for_is_not_open() -> None:
    async def run(flight: Flight[Any]) -> edit_service_pb2.EditResponse:
        await asyncio.Event().wait()
        raise AssertionError

    with Flight(run) as flight:
        assert flight.open
    assert not flight.open
    with pytest.raises(asyncio.CancelledError):
        await flight.result()


async def test_a_deadline_passes_as_such(wire: Wire) -> None:
    wire.engine.held = True
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await wire.edits.Edit(edit(), timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: wire.engine.cancelled)
