"""What one caller may hold: connections, calls, and requests that never arrive."""

import asyncio
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support import http2
from support.front import SETTINGS, Refusal, Wire, edit, refused, started
from support.waiting import until
from underpaint.v1 import direction_service_pb2 as directions
from underpaint.v1 import edit_service_pb2
from underpaint_server.rpc.calls import interceptor, limits

EDIT = "/underpaint.v1.EditService/Edit"
IMPORT = "/underpaint.v1.DirectionService/ImportDirection"
SHORT = SETTINGS.model_copy(update={"request_arrival_s": 0.5})
PATIENT = SETTINGS.model_copy(update={"max_slow_requests": 1})


async def silent(*first: bytes) -> AsyncIterator[bytes]:
    """These messages, and then neither another nor the end of the stream."""
    for message in first:
        yield message
    await asyncio.Event().wait()


def begun(wire: Wire, path: str, *first: bytes) -> Any:
    """A call that sends these messages and then nothing."""
    stub: Any = wire.channel.stream_stream(path)
    return stub(silent(*first))


def counted(wire: Wire, rpc: str, code: str, reason: str) -> float:
    labels = {"rpc": rpc, "method": "", "code": code, "reason": reason}
    return sum(wire.metric("underpaint_requests_total", **labels | {"method": method}) for method in ("", "edict"))


def check_incomplete(refusal: Refusal) -> None:
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "REQUEST_INCOMPLETE")
    assert "0.5 s" in refusal.message


@pytest.mark.parametrize("path", [EDIT, IMPORT, "/grpc.health.v1.Health/Check"])
async def test_a_call_without_a_message_ends(path: str) -> None:
    async with started(SHORT) as wire:
        check_incomplete(await refused(begun(wire, path)))


async def test_a_call_whose_end_is_held_back_ends() -> None:
    async with started(SHORT) as wire:
        check_incomplete(await refused(begun(wire, EDIT, edit().SerializeToString())))
        assert not wire.engine.handles


async def test_an_upload_whose_next_part_is_held_back_ends() -> None:
    header = directions.ImportDirectionRequest(header=directions.Direction(name="directions/mine"))
    async with started(SHORT) as wire:
        check_incomplete(await refused(begun(wire, IMPORT, header.SerializeToString())))


async def test_a_message_whose_last_bytes_are_held_back_is_given_up() -> None:
    message = http2.message(edit().SerializeToString())
    async with started(SHORT) as wire:
        with connected(wire.address, http2.opened(EDIT.encode(), message[:-1])):
            await until(lambda: counted(wire, "Edit", "DEADLINE_EXCEEDED", "REQUEST_INCOMPLETE") == 1)
        assert wire.context.limits.calls == 0


@pytest.mark.parametrize("rpc", ["Edit", "StreamEdit"])
async def test_a_caller_who_does_not_take_its_answer_ends(monkeypatch: pytest.MonkeyPatch, rpc: str) -> None:
    monkeypatch.setattr(interceptor, "_TAKEN_S", 0.5)
    no_room = http2.frame(http2.SETTINGS, 0, 0, struct.pack(">HI", 4, 0))
    request = edit() if rpc == "Edit" else edit_service_pb2.StreamEditRequest(edit=edit())
    call = http2.call(f"/underpaint.v1.EditService/{rpc}".encode(), http2.message(request.SerializeToString()))
    async with started() as wire:
        with connected(wire.address, no_room + call):
            await until(lambda: counted(wire, rpc, "CANCELLED", "CANCELLED") == 1)
            assert (wire.context.limits.calls, wire.context.limits.held_bytes) == (0, 0)


async def test_a_slow_request_beyond_the_limit_is_refused() -> None:
    async with started(PATIENT) as wire:
        first = begun(wire, EDIT)
        await until(lambda: wire.context.limits.slow_requests == 1)
        late = await refused(begun(wire, EDIT))
        assert (late.code, late.reason) == (grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL")
        assert not first.done()
        assert wire.context.limits.slow_requests == 1
        assert await wire.edits.Edit(edit()), "others are not slow"
        first.cancel()
        await until(lambda: wire.context.limits.slow_requests == wire.context.limits.calls == 0)


async def test_calls_without_a_request_keep_nobody_out() -> None:
    async with started(SETTINGS.model_copy(update={"max_calls": 1})) as wire:
        silent_calls = [begun(wire, EDIT) for _ in range(20)]
        assert await wire.edits.Edit(edit())
        await until(lambda: wire.context.limits.slow_requests == 16)
        assert await wire.edits.Edit(edit())
        for call in silent_calls:
            call.cancel()


async def test_an_old_slow_request_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_OLD_S", 0.0)
    async with started(PATIENT) as wire:
        first = begun(wire, EDIT)
        await until(lambda: wire.context.limits.slow_requests == 1)
        second = begun(wire, EDIT)
        assert (await refused(first)).reason == "QUEUE_FULL"
        assert wire.context.limits.slow_requests == 1
        assert not second.done()
        second.cancel()


async def test_calls_beyond_the_limit_are_refused_and_probes_answered() -> None:
    async with started(SETTINGS.model_copy(update={"max_calls": 2})) as wire:
        wire.engine.held = True
        running = [asyncio.ensure_future(wire.edits.Edit(edit())) for _ in range(2)]
        await until(lambda: len(wire.engine.handles) == 2)
        late = await refused(wire.edits.Edit(edit()))
        assert (late.code, late.reason) == (grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL")
        assert "RetryInfo" in late.details
        health: Any = health_pb2_grpc.HealthStub(wire.channel)
        assert (await refused(health.Watch(health_pb2.HealthCheckRequest()))).reason == "QUEUE_FULL"
        assert (await health.Check(health_pb2.HealthCheckRequest(service="liveness"))).status
        assert wire.metric("underpaint_calls_in_progress") == 2
        for handle in wire.engine.handles:
            wire.engine.finish(handle)
        await asyncio.gather(*running)
        await until(lambda: wire.context.limits.calls == 0)


# --- connections ------------------------------------------------------------------------------------------------------


@contextmanager
def connected(address: str, *frames: bytes) -> Iterator[socket.socket]:
    """A connection that has sent these frames and stays open."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as one:
        one.sendall(http2.PREFACE + b"".join(frames))
        yield one


async def received(one: socket.socket, count: int) -> bytes:
    one.setblocking(False)
    loop, data = asyncio.get_running_loop(), b""
    while len(data) < count and (some := await loop.sock_recv(one, 65536)):
        data += some
    return data


async def test_the_calls_of_one_connection_are_limited() -> None:
    async with started(SETTINGS.model_copy(update={"max_streams": 7})) as wire:
        with connected(wire.address) as one:
            head = await received(one, 9)
            length = int.from_bytes(head[:3])
            settings = (head + await received(one, 9 + length - len(head)))[9 : 9 + length]
            values = dict(struct.iter_unpack(">HI", settings))
            assert values[3] == 7, "SETTINGS_MAX_CONCURRENT_STREAMS"


@pytest.mark.skipif(tuple(map(int, grpc.__version__.split(".")[:2])) < (1, 70), reason="the library has no such limit")
async def test_connections_beyond_the_limit_are_closed() -> None:
    async with started(SETTINGS.model_copy(update={"max_connections": 2})) as wire:
        assert await wire.edits.Edit(edit()), "the first connection"
        with connected(wire.address) as second, connected(wire.address) as third:
            assert await received(second, 9)
            assert not await received(third, 9)
            assert await wire.edits.Edit(edit()), "those that there are go on"


@pytest.mark.parametrize(("hard", "allowed"), [(1000, 600), (400, 400)])
def test_the_process_may_open_the_files_that_its_connections_need(hard: int, allowed: int) -> None:
    code = (
        f"import resource as r; from underpaint_server.server import _raise_open_files;"
        f"r.setrlimit(r.RLIMIT_NOFILE, (256, {hard})); _raise_open_files(600); print(r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    ended = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=True)
    assert ended.stdout.split()[-1] == str(allowed)
    assert ("too few open files" in ended.stdout + ended.stderr) == (allowed < 600)
