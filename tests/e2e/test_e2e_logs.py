"""The log of a real process: whole, forged by nobody, and no call waits for it or fails with it."""

import asyncio
import json
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from e2e.harness import Samples
from grpc import aio
from support import http2
from support.front import edit, refused
from support.waiting import PATIENCE_S
from underpaint.v1 import edit_service_pb2_grpc

ADDRESSES = ("--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0")


class Logged:
    """A server whose log is read line by line here, or not at all."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "underpaint_server", "--models=toy=toy:", *ADDRESSES], stderr=subprocess.PIPE
        )
        self.seen: list[str] = []
        listening = self.wait_for("listening")
        self.address, self.metrics = listening["address"], listening["metrics_address"]
        self.wait_for("ready")

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next line with this event."""
        assert self.process.stderr is not None
        for raw in self.process.stderr:
            self.seen.append(raw.decode())
            line: dict[str, Any] = json.loads(raw)
            if line["event"] == event:
                return line
        raise AssertionError(f"the log ended before '{event}'")


@pytest.fixture(scope="module")
def logged() -> Iterator[Logged]:
    server = Logged()
    with server.process:  # closes its stderr too, which a garbage collector would complain of in another test
        yield server
        server.process.kill()


async def test_a_caller_cannot_forge_log_lines(logged: Logged) -> None:
    forged = '{"event": "forged"}'
    debug_text = b"too_many_pings\n" + forged.encode() + b"\n"
    await http2.send(logged.address, http2.frame(http2.GOAWAY, 0, 0, struct.pack(">II", 0, 11) + debug_text))
    bad_header = (b"x-name", b"\xff\n" + forged.encode())
    await http2.send(logged.address, http2.call(b"/x\n" + forged.encode(), http2.message(b""), headers=[bad_header]))
    async with aio.insecure_channel(logged.address) as channel:
        stub: Any = edit_service_pb2_grpc.EditServiceStub(channel)
        await refused(stub.Edit(edit(model=f"models/x\n{forged}")))
    line = await asyncio.to_thread(logged.wait_for, "rpc")
    while line["code"] != "NOT_FOUND" and line["reason"] != "FIELD_INVALID":
        line = await asyncio.to_thread(logged.wait_for, "rpc")
    assert all(json.loads(line)["event"] != "forged" for line in logged.seen)
    assert not any("Traceback" in line for line in logged.seen)


async def test_a_path_that_the_library_cannot_decode_does_not_end_the_server(logged: Logged) -> None:
    await http2.send(logged.address, http2.call(b"/x/\xff\xfe", http2.message(b"")))
    await asyncio.to_thread(logged.wait_for, "listening again")
    async with aio.insecure_channel(logged.address) as channel:
        stub: Any = edit_service_pb2_grpc.EditServiceStub(channel)
        assert (await stub.Edit(edit("sdedit"), wait_for_ready=True)).image.content


async def test_calls_are_served_while_nobody_reads_the_log_and_when_its_reader_is_gone(logged: Logged) -> None:
    async with aio.insecure_channel(logged.address) as channel:
        stub: Any = edit_service_pb2_grpc.EditServiceStub(channel)
        unknown: Any = channel.unary_unary("/" + "x" * 120)
        for _ in range(700):  # several times what a pipe holds
            await refused(unknown(b""))
        assert (await stub.Edit(edit("sdedit"))).image.content
        assert logged.process.stderr is not None
        logged.process.stderr.close()
        await refused(unknown(b""))
        assert (await stub.Edit(edit("sdedit"))).image.content
        await _dropped(logged)
    logged.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(logged.process.wait, PATIENCE_S) == 0


async def _dropped(logged: Logged) -> None:
    """Wait until lines are counted as dropped."""
    host, _, port = logged.metrics.rpartition(":")
    async with asyncio.timeout(PATIENCE_S):
        while True:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
            page = (await reader.read()).decode().partition("\r\n\r\n")[2]
            writer.close()
            if Samples(page).sum("underpaint_log_lines_dropped_total") > 0:
                return
            await asyncio.sleep(0.05)
