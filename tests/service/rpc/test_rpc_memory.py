"""Nothing of a call stays when it has ended, however it ended: not even until the garbage collector comes."""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from support.front import Wire, edit, overdue, photo, refused
from support.waiting import until
from underpaint.v1 import direction_service_pb2, edit_service_pb2, inversion_service_pb2, types_pb2
from underpaint_server.dispatch.job_handle import JobHandle
from underpaint_server.errors import QueueFull, StoreUnavailable
from underpaint_server.rpc.calls.singleflight import SharedCall

BAD = types_pb2.Image(content=b"\x89PNG\r\n\x1a\n" + bytes(50_000))


@pytest.fixture
def kept() -> Iterator[Callable[[], list[str]]]:
    """What is left of the server's calls: what only the garbage collector could free, and shared calls."""
    gc.collect()
    gc.disable()

    def look() -> list[str]:
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            gc.collect()
            left = [_name(one) for one in gc.garbage if _is_of_a_call(one)]
            return left + [_name(one) for one in _shared_calls()]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()

    yield look
    gc.enable()


def _shared_calls() -> list[SharedCall[Any]]:
    """Those that exist. With the garbage collector off, one in a reference cycle is among them for ever."""
    return [one for one in gc.get_objects() if type(one) is SharedCall]


def _is_of_a_call(one: Any) -> bool:
    code = getattr(one, "f_code", None)
    return isinstance(one, SharedCall | JobHandle) or (code is not None and "underpaint_server" in code.co_filename)


def _name(one: Any) -> str:
    return one.f_code.co_qualname if hasattr(one, "f_code") else type(one).__name__


def _invert(image: types_pb2.Image) -> inversion_service_pb2.InvertRequest:
    request = inversion_service_pb2.InvertRequest(image=image)
    request.parameters.ddim.SetInParent()
    return request


async def _fails_in_the_engine(wire: Wire, call: Any) -> None:
    wire.engine.held = True
    task = asyncio.ensure_future(_read_all(call))
    await wire.engine.submitted.wait()
    wire.engine.handles[-1].end(StoreUnavailable("gone"))
    with pytest.raises(grpc.aio.AioRpcError):
        await task


async def _read_all(call: Any) -> None:
    if not hasattr(call, "read"):
        await call
    while hasattr(call, "read") and await call.read() is not grpc.aio.EOF:
        pass


async def _cancelled(wire: Wire, call: Any) -> None:
    wire.engine.held = True
    await wire.engine.submitted.wait()
    call.cancel()
    await until(lambda: wire.engine.cancelled)


async def _bug(wire: Wire) -> None:
    wire.engine.refusals = [ZeroDivisionError("unforeseen")]  # type: ignore[list-item]
    await refused(wire.edits.Edit(edit()))


async def _full(wire: Wire) -> None:
    wire.engine.refusals = [QueueFull("full")]
    await refused(wire.edits.Edit(edit()))


async def _late(wire: Wire) -> None:
    wire.engine.held = True
    await overdue(wire, lambda timeout_s: wire.edits.Edit(edit(), timeout=timeout_s))
    await until(lambda: wire.engine.cancelled == wire.engine.handles)


def _stream(**fields: Any) -> edit_service_pb2.StreamEditRequest:
    return edit_service_pb2.StreamEditRequest(edit=edit(**fields))


async def _two_wait_for_one(wire: Wire) -> None:
    wire.engine.held = True
    calls = [asyncio.ensure_future(refused(wire.inversions.Invert(_invert(photo())))) for _ in range(2)]
    await until(lambda: wire.metric("underpaint_inversion_store_requests_total", result="joined"))
    wire.engine.handles[-1].end(StoreUnavailable("gone"))
    await asyncio.gather(*calls)


async def _undecodable(wire: Wire) -> None:
    stub: Any = wire.channel.unary_unary("/underpaint.v1.EditService/Edit")
    await refused(stub(b"\xff\xff" + bytes(50_000)))


def _learn() -> direction_service_pb2.LearnDirectionRequest:
    request = direction_service_pb2.LearnDirectionRequest()
    request.examples.add().image.CopyFrom(BAD)
    return request


ENDS: dict[str, Callable[[Wire], Awaitable[Any]]] = {
    "a wrong field": lambda wire: refused(wire.edits.Edit(edit(guidance_scale=99))),
    "a wrong field of a stream": lambda wire: refused(wire.edits.StreamEdit(_stream(guidance_scale=99))),
    "a bad image": lambda wire: refused(wire.edits.Edit(edit(image=BAD))),
    "a bad image of a stream": lambda wire: refused(wire.edits.StreamEdit(_stream(image=BAD))),
    "a bad image to invert": lambda wire: refused(wire.inversions.Invert(_invert(BAD))),
    "a bad mask": lambda wire: refused(wire.edits.Edit(edit("diffedit", diffedit={"mask": BAD}))),
    "a mask of an image that is bad": lambda wire: refused(
        wire.edits.ComputeMask(edit_service_pb2.ComputeMaskRequest(edit=edit("diffedit", image=BAD)))
    ),
    "nothing to learn": lambda wire: refused(wire.directions.LearnDirection(_learn())),
    "no message": _undecodable,
    "a full queue": _full,
    "a bug": _bug,
    "a failed job": lambda wire: _fails_in_the_engine(wire, wire.edits.Edit(edit())),
    "a failed job of a stream": lambda wire: _fails_in_the_engine(wire, wire.edits.StreamEdit(_stream())),
    "a failed inversion": lambda wire: _fails_in_the_engine(wire, wire.inversions.Invert(_invert(photo()))),
    "a failed inversion that two wait for": _two_wait_for_one,
    "a caller that left": lambda wire: _cancelled(wire, wire.edits.Edit(edit())),
    "a caller that left a stream": lambda wire: _cancelled(wire, wire.edits.StreamEdit(_stream())),
    "a caller that left an inversion": lambda wire: _cancelled(wire, wire.inversions.Invert(_invert(photo()))),
    "a deadline": _late,
    "an answer": lambda wire: wire.edits.Edit(edit()),
}


@pytest.mark.parametrize("how", ENDS)
async def test_a_call_that_has_ended_is_gone(wire: Wire, kept: Callable[[], list[str]], how: str) -> None:
    await wire.edits.Edit(edit("sdedit"))
    wire.engine.handles.clear()
    wire.engine.submitted.clear()
    await asyncio.sleep(0.1)
    kept()
    tasks = len(asyncio.all_tasks())
    await ENDS[how](wire)
    await until(lambda: len(asyncio.all_tasks()) <= tasks)
    for held in (wire.engine.handles, wire.engine.cancelled, wire.engine.refusals):
        held.clear()
    await until(lambda: not _shared_calls())  # a thread that has just ended may hold its call a moment longer
    assert kept() == []


async def test_an_answer_is_kept_for_repeats_and_nothing_else_is(wire: Wire, kept: Callable[[], list[str]]) -> None:
    request_id = "7f6b1c9e-58f5-4a39-9d3c-3b1f0e6b2f11"
    await wire.edits.Edit(edit(request_id=request_id))
    tasks = len(asyncio.all_tasks())
    again = await wire.edits.Edit(edit(request_id=request_id))
    assert again.image.content
    await until(lambda: len(asyncio.all_tasks()) <= tasks)
    wire.engine.handles.clear()
    await until(lambda: len(_shared_calls()) == 1)
    assert kept() == ["SharedCall"]


async def test_what_is_remembered_does_not_grow_with_malformed_requests(wire: Wire) -> None:
    def remembered() -> tuple[int, int, int]:
        samples = sum(len(family.samples) for family in wire.metrics.registry.collect())
        return samples, len(wire.context.idempotency._entries), len(wire.context.inverting._calls)

    def raw(path: str) -> Any:
        return wire.channel.unary_unary(path)

    async def malformed(number: int) -> None:
        for call in (
            wire.edits.Edit(edit(model=f"models/{number}", request_id=str(number))),
            wire.edits.Edit(edit(image=BAD, request_id=f"7f6b1c9e-58f5-4a39-9d3c-{number:012x}")),
            wire.edits.Edit(edit(inversion=f"inversions/{number:064x}")),
            wire.inversions.Invert(_invert(BAD)),
            raw(f"/a.{number}/B{number}")(b""),
            raw("/underpaint.v1.EditService/Edit")(b"\xff" + str(number).encode()),
        ):
            await refused(call)

    await malformed(0)
    before = remembered()
    for number in range(1, 20):
        await malformed(number)
    assert remembered() == before
    assert before[1:] == (0, 0)


async def test_a_request_that_the_library_s_own_service_refuses_is_gone(
    wire: Wire, kept: Callable[[], list[str]]
) -> None:
    stub: Any = wire.channel.unary_unary("/grpc.health.v1.Health/Check")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub(health_pb2.HealthCheckRequest(service="none").SerializeToString())
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    labels = {"rpc": "Check", "method": "", "code": "NOT_FOUND", "reason": ""}
    await until(lambda: wire.metric("underpaint_requests_total", **labels))
    await asyncio.sleep(0)
    assert not any(type(one) is health_pb2.HealthCheckRequest for one in gc.get_objects())
