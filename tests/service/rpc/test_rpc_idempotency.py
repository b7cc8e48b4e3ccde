"""A repeated request id never computes twice, and a job lives as long as somebody waits for it."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

import grpc
import pytest
import pytest_asyncio
from support.front import MINI, SETTINGS, Wire, edit, overdue, photo, refused, started
from support.front import answer as computed
from support.waiting import PATIENCE_S, until
from underpaint.v1 import edit_service_pb2, edit_service_pb2_grpc, inversion_service_pb2
from underpaint_server.errors import FieldInvalid, QueueFull, RequestIdReused
from underpaint_server.rpc.calls.idempotency import Idempotency, fingerprint
from underpaint_server.rpc.calls.singleflight import NEVER, Deadline, SharedCall, SingleFlight
from underpaint_server.rpc.handlers import source
from underpaint_server.telemetry import Metrics


async def test_a_repeat_gets_the_first_answer(wire: Wire) -> None:
    request = edit(request_id=str(uuid4()))
    first = await wire.edits.Edit(request)
    assert await wire.edits.Edit(request) == first
    assert len(wire.engine.jobs) == 1
    assert wire.metric("underpaint_idempotent_replays_total", result="replayed") == 1


async def test_an_id_is_the_same_in_capitals(wire: Wire) -> None:
    name = str(uuid4())
    first = await wire.edits.Edit(edit(request_id=name))
    assert await wire.edits.Edit(edit(request_id=name.upper())) == first
    assert len(wire.engine.jobs) == 1


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


async def last(stream: Any) -> edit_service_pb2.EditResponse:
    while (event := await stream.read()).WhichOneof("event") != "result":
        pass
    result: edit_service_pb2.EditResponse = event.result
    return result


@pytest.mark.parametrize("streamed", [False, True])
async def test_nothing_of_a_job_outlives_its_answer(wire: Wire, streamed: bool) -> None:
    wire.engine.held = True
    request = edit("edict", request_id=str(uuid4()))
    stream = edit_service_pb2.StreamEditRequest(edit=request)
    call = wire.edits.StreamEdit(stream) if streamed else wire.edits.Edit(request)
    if streamed:
        await call.read()
    await wire.engine.submitted.wait()
    handle = wire.engine.handles.pop()
    pixels: Any = handle.job.source.pixels
    result: Any = computed(handle.job, MINI)
    handle.end(result)
    left: dict[str, weakref.ref[Any]] = {
        "handle": weakref.ref(handle),
        "photo": weakref.ref(pixels),
        "result": weakref.ref(result.pixels),
        "latents": weakref.ref(result.inversion.arrays["x"]),
    }
    del handle, pixels, result
    first = await (last(call) if streamed else call)

    def alive() -> list[str]:
        gc.collect()
        return [name for name, there in left.items() if there() is not None]

    await until(lambda: not alive())  # the server's task ends a few turns of the loop after the answer is here
    assert await wire.edits.Edit(request) == first


# --- deadlines of several callers ---------------------------------------------------------------------------------


def inversion(request_id: str = "") -> inversion_service_pb2.InvertRequest:
    edict = inversion_service_pb2.InversionParameters(edict=inversion_service_pb2.EdictInversion())
    return inversion_service_pb2.InvertRequest(request_id=request_id, image=photo(), parameters=edict)


@pytest.mark.parametrize("joins", ["request id", "inversion"])
@pytest.mark.parametrize("timeout", [None, 5000])
async def test_work_that_is_joined_has_the_later_deadline(wire: Wire, joins: str, timeout: float | None) -> None:
    wire.engine.held = True
    request = inversion(str(uuid4()) if joins == "request id" else "")
    first = wire.inversions.Invert(request, timeout=50)
    await wire.engine.submitted.wait()
    handle = wire.engine.handles[0]
    early = handle.deadline
    assert early is not None
    second = wire.inversions.Invert(request, timeout=timeout)
    await wire.engine.extended.wait()
    if timeout is None:
        assert handle.deadline is None
    else:
        assert handle.deadline is not None
        assert handle.deadline > early + 1000
    wire.engine.finish(handle)
    assert (await first).inversion == (await second).inversion
    assert len(wire.engine.jobs) == 1


async def test_an_earlier_deadline_shortens_nothing(wire: Wire) -> None:
    wire.engine.held = True
    first = wire.inversions.Invert(inversion())
    await wire.engine.submitted.wait()
    second = wire.inversions.Invert(inversion(), timeout=50)
    await until(lambda: wire.metric("underpaint_inversion_store_requests_total", result="joined") == 1)
    assert wire.engine.handles[0].deadline is None
    wire.engine.finish(wire.engine.handles[0])
    assert await first
    assert await second


async def test_who_joins_before_admission_is_counted_too(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, decoded = asyncio.Event(), asyncio.Event()
    read = source.Fetcher.picture

    async def slowly(*args: Any) -> Any:
        decoding.set()
        await decoded.wait()
        return await read(*args)

    monkeypatch.setattr(source.Fetcher, "picture", slowly)
    request = edit(request_id=str(uuid4()))
    first = wire.edits.Edit(request, timeout=50)
    await decoding.wait()
    second = wire.edits.Edit(request)
    await until(lambda: wire.metric("underpaint_idempotent_replays_total", result="joined") == 1)
    decoded.set()
    assert await first == await second
    assert wire.engine.deadlines == [None]


@pytest.mark.parametrize(("later", "latest"), [(None, None), (7.0, 7.0), (3.0, 5.0)])
async def test_a_shared_call_has_the_latest_deadline_of_all_who_wait(later: float | None, latest: float | None) -> None:
    async def run(call: SharedCall[Any]) -> float | None:
        return call.deadline.at

    shared: SingleFlight[float | None] = SingleFlight(on_join=lambda: None)
    with shared.join("key", run, Deadline(5.0)), shared.join("key", run, Deadline(later)) as call:
        assert await call.result() == latest


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


@pytest_asyncio.fixture
async def patient() -> AsyncIterator[Wire]:
    """A server that keeps the work of callers who have left for longer than any test lasts."""
    async with started(SETTINGS.model_copy(update={"rejoin_s": 2 * PATIENCE_S})) as wire:
        yield wire


async def left(wire: Wire) -> None:
    """Wait until the server has noticed that a caller has left."""
    await until(lambda: "CANCELLED" in {
        sample.labels.get("grpc_code")
        for metric in wire.metrics.registry.collect() for sample in metric.samples if sample.value
    })  # fmt: skip


@pytest.mark.parametrize("how", ["cancelled", "connection lost"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_work_goes_on_for_a_caller_that_comes_back(patient: Wire, how: str, streamed: bool) -> None:
    patient.engine.held = True
    request = edit(request_id=str(uuid4()))
    stream = edit_service_pb2.StreamEditRequest(edit=request)
    async with grpc.aio.insecure_channel(patient.address) as channel:
        stub: Any = edit_service_pb2_grpc.EditServiceStub(channel)
        call = stub.StreamEdit(stream) if streamed else stub.Edit(request)
        if streamed:
            await call.read()
        await patient.engine.submitted.wait()
        if how == "cancelled":
            call.cancel()
            await left(patient)
    await left(patient)
    assert patient.engine.cancelled == []
    again = patient.edits.StreamEdit(stream) if streamed else patient.edits.Edit(request)
    await until(lambda: patient.metric("underpaint_idempotent_replays_total", result="joined") == 1)
    patient.engine.finish(patient.engine.handles[0])
    assert (await (last(again) if streamed else again)).image.content
    assert len(patient.engine.jobs) == 1


async def test_work_that_ends_before_its_caller_comes_back_is_not_done_again(patient: Wire) -> None:
    patient.engine.held = True
    request = edit(request_id=str(uuid4()))
    call = patient.edits.Edit(request)
    await patient.engine.submitted.wait()
    call.cancel()
    await left(patient)
    patient.engine.finish(patient.engine.handles[0])
    assert (await patient.edits.Edit(request)).image.content
    assert len(patient.engine.jobs) == 1


async def test_work_without_an_id_ends_with_its_caller(patient: Wire) -> None:
    patient.engine.held = True
    call = patient.edits.Edit(edit())
    await patient.engine.submitted.wait()
    call.cancel()
    await until(lambda: patient.engine.cancelled)


async def test_work_whose_deadline_has_passed_is_not_kept_for_its_caller(patient: Wire) -> None:
    patient.engine.held = True
    await overdue(patient, lambda timeout_s: patient.edits.Edit(edit(request_id=str(uuid4())), timeout=timeout_s))
    await until(lambda: patient.engine.cancelled)


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


def table(max_bytes: int = 10_000) -> tuple[Idempotency, Clock]:
    clock = Clock()
    return Idempotency(ttl_s=60, max_bytes=max_bytes, rejoin_s=0, metrics=Metrics(), clock=clock), clock


async def ask(replay: Idempotency, request_id: str, print_: bytes = b"p", bytes_: int = 100) -> tuple[Any, bool]:
    """The answer, and whether it was computed just now."""
    ran = False

    async def run(call: SharedCall[Any]) -> edit_service_pb2.EditResponse:
        nonlocal ran
        ran = True
        return edit_service_pb2.EditResponse(inversion="x" * bytes_)

    with replay.join(request_id, print_, edit_service_pb2.EditResponse, run, NEVER) as call:
        return await call.result(), ran


async def test_small_answers_are_limited_by_their_number() -> None:
    """Each takes more memory than its own bytes."""
    replay = Idempotency(rejoin_s=0, ttl_s=60, max_bytes=10**9, metrics=Metrics(), max_answers=5)
    ids = [str(uuid4()) for _ in range(20)]
    for request_id in ids:
        await ask(replay, request_id, bytes_=1)
    again = [(await ask(replay, request_id, bytes_=1))[1] for request_id in ids[:15:-1]]
    assert again == [False] * 4, "the newest are kept"
    assert (await ask(replay, ids[0], bytes_=1))[1]
    assert len(replay._entries) == 5


async def test_a_kept_answer_keeps_nothing_else_of_its_call() -> None:
    replay, _ = table()

    class Request:
        """Stands for a request with its image."""

    request = Request()
    gone = weakref.ref(request)
    KEPT.set(request)

    async def run(call: SharedCall[Any]) -> edit_service_pb2.EditResponse:
        return edit_service_pb2.EditResponse(inversion="x")

    async def call() -> None:
        with replay.join(str(uuid4()), b"p", edit_service_pb2.EditResponse, run, NEVER) as joined:
            await joined.result()

    await asyncio.create_task(call())
    KEPT.set(None)
    del request
    await asyncio.sleep(0)
    assert gone() is None


KEPT: ContextVar[Any] = ContextVar("kept")


async def test_answers_are_kept_for_their_time_only() -> None:
    replay, clock = table()
    request_id = str(uuid4())
    assert (await ask(replay, request_id))[1]
    clock.now = 59.9
    assert not (await ask(replay, request_id))[1]
    clock.now = 60.0
    assert (await ask(replay, request_id, b"another"))[1]


async def test_answers_are_kept_within_their_bytes_the_oldest_go_first() -> None:
    replay, _ = table(max_bytes=350)
    ids = [str(uuid4()) for _ in range(4)]
    for request_id in ids:
        await ask(replay, request_id)
    assert [not (await ask(replay, request_id))[1] for request_id in reversed(ids)] == [True, True, True, False]


async def test_an_answer_larger_than_all_bytes_is_not_kept() -> None:
    replay, _ = table(max_bytes=50)
    request_id = str(uuid4())
    assert [(await ask(replay, request_id))[1] for _ in range(2)] == [True, True]


@pytest.mark.parametrize(
    "request_id",
    [
        "x",
        " ",
        "00000000-0000-1000-8000-000000000000",
        "00000000-0000-4000-0000-000000000000",
        "0123456789ab4def8123456789abcdef",
        "{01234567-89ab-4def-8123-456789abcdef}",
        "urn:uuid:01234567-89ab-4def-8123-456789abcdef",
        "01234567-89ab-4def-8123-456789abcdef\n",
        "01234567-89ab-4def-8123-456789abcdef" + "-" * 20_000,
    ],
)
async def test_ids_are_uuid4(request_id: str) -> None:
    with pytest.raises(FieldInvalid, match="request_id"):
        await ask(table()[0], request_id)


async def test_another_payload_is_refused_while_running_and_after() -> None:
    replay, _ = table()
    request_id, release = str(uuid4()), asyncio.Event()

    async def run(call: SharedCall[Any]) -> edit_service_pb2.EditResponse:
        await release.wait()
        return edit_service_pb2.EditResponse()

    with replay.join(request_id, b"p", edit_service_pb2.EditResponse, run, NEVER) as call:
        with pytest.raises(RequestIdReused):
            replay.join(request_id, b"q", edit_service_pb2.EditResponse, run, NEVER)
        release.set()
        await call.result()
    with pytest.raises(RequestIdReused):
        replay.join(request_id, b"q", edit_service_pb2.EditResponse, run, NEVER)


def test_a_fingerprint_tells_requests_and_rpcs_apart() -> None:
    prints = {fingerprint("edit", edit()), fingerprint("mask", edit()), fingerprint("edit", edit(seed=0))}
    assert len(prints) == 3
    assert fingerprint("edit", edit()) in prints


async def test_an_error_after_the_last_caller_left_goes_nowhere() -> None:
    """No "exception was never retrieved" from the loop."""
    heard: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    ended = asyncio.Event()

    async def run(call: SharedCall[Any]) -> edit_service_pb2.EditResponse:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.set()
            raise QueueFull("too late") from None
        raise AssertionError

    with SharedCall(run, NEVER):
        await asyncio.sleep(0)
    await ended.wait()
    await asyncio.sleep(0)
    gc.collect()
    await asyncio.sleep(0)
    assert heard == []


async def test_a_shared_call_that_nobody_waits_for_is_not_open() -> None:
    async def run(call: SharedCall[Any]) -> edit_service_pb2.EditResponse:
        await asyncio.Event().wait()
        raise AssertionError

    with SharedCall(run, NEVER) as call:
        assert call.open
    assert not call.open
    with pytest.raises(asyncio.CancelledError):
        await call.result()


async def test_a_deadline_passes_as_such(wire: Wire) -> None:
    wire.engine.held = True
    error = await overdue(wire, lambda timeout_s: wire.edits.Edit(edit(), timeout=timeout_s))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: wire.engine.cancelled)
