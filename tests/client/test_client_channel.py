"""What the channel does by itself: spread, limit, open and close."""

import asyncio
import math
import subprocess
import sys
import threading
import time

import grpc
import pytest
from support.waiting import PATIENCE_S
from underpaint import Client, errors
from underpaint.v1 import edit_service_pb2, types_pb2

MIB = 1 << 20


def test_calls_spread_over_all_addresses_of_a_target(connect, server, photo):
    other = type(server)()
    try:
        client = connect(f"ipv4:{server.target},{other.target}")
        for _ in range(40):
            client.edit(photo, "t")
        assert len(server.requests) + len(other.requests) == 40
        assert server.requests
        assert other.requests
    finally:
        other.stop()


def test_a_timeout_reaches_the_server_and_ends_the_call(client, server, photo):
    release = threading.Event()

    def slow(request, context):
        release.wait(PATIENCE_S)
        return edit_service_pb2.EditResponse()

    client.edit(photo, "t")  # connects: the time below is the call's alone
    arrived = len(server.time_remaining)
    for timeout in (2, 8, 32, 128):  # a busy machine may need longer to deliver the call
        server.script("Edit", slow)
        with pytest.raises(errors.DeadlinePassed, match="the timeout passed before the server answered") as caught:
            client.edit(photo, "t", timeout=timeout, request_id="6e2f9d9c-5c8f-4a0c-9b43-0d8f4f1f7a11")
        if len(server.time_remaining) > arrived:
            break
    release.set()
    assert caught.value.request_id == "6e2f9d9c-5c8f-4a0c-9b43-0d8f4f1f7a11"
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert len(server.time_remaining) > arrived
    assert 0 < server.time_remaining[-1] < timeout + 1


def test_the_clients_timeout_holds_where_a_call_names_none(connect, server, photo):
    client = connect(server.target, timeout=7)
    client.edit(photo, "t")
    client.edit(photo, "t", timeout=3)
    default, own = server.time_remaining
    assert 3.5 < default < 7.5  # gRPC rounds a timeout up, by a percent or two
    assert 0 < own < 3.5


@pytest.mark.parametrize("timeout", [1e10, 1e300, math.inf])
def test_a_timeout_without_end_is_no_limit(connect, server, photo, timeout):
    client = connect(server.target, timeout=timeout, connect_timeout=timeout)
    client.edit(photo, "t")
    client.edit(photo, "t", timeout=timeout, progress=lambda progress: None)
    assert min(server.time_remaining) > 1e6


def test_a_timeout_that_is_no_number_is_refused(connect, server, photo):
    with pytest.raises(ValueError, match="timeout is nan"):
        connect(server.target).edit(photo, "t", timeout=math.nan)
    assert not server.requests


def test_a_repeat_after_expiry_has_only_the_time_that_is_left(client, server, photo, refusal):
    gone = refusal(grpc.StatusCode.NOT_FOUND, "INVERSION_EXPIRED")

    def slowly_gone(request, context):
        time.sleep(1)
        gone(request, context)

    inversion = client.invert(photo)
    server.script("Edit", slowly_gone)
    client.edit(inversion, "t", timeout=5)
    _, first, second = server.time_remaining
    assert second < first - 0.5


def test_a_message_over_the_transports_limit(client, server, photo):
    with pytest.raises(errors.PayloadTooLarge):
        client.edit(photo + bytes(25 * MIB), "t")

    def huge(request, context):
        return edit_service_pb2.EditResponse(image=types_pb2.Image(content=bytes(25 * MIB)))

    server.script("Edit", huge)
    with pytest.raises(errors.PayloadTooLarge):
        client.edit(photo, "t")


def test_messages_of_sixteen_mebibytes_pass_both_ways(client, server, photo):
    def large(request, context):
        return edit_service_pb2.EditResponse(image=types_pb2.Image(content=bytes(16 * MIB)))

    server.script("Edit", large)
    assert len(client.edit(photo + bytes(16 * MIB), "t").image_bytes) == 16 * MIB


def test_options_of_the_callers_win(connect, server, photo):
    client = connect(server.target, options=[("grpc.max_send_message_length", 1000)])
    with pytest.raises(errors.PayloadTooLarge):
        client.edit(photo + bytes(1000), "t")


def test_nothing_is_opened_before_the_first_call(kind, server):
    from underpaint import AsyncClient

    before = set(threading.enumerate())
    (Client if kind == "sync" else AsyncClient)(server.target)
    assert set(threading.enumerate()) <= before  # threads of earlier channels may end meanwhile
    assert server.requests == []


_FORKING = """
import os, sys
from underpaint import Client

client = Client(sys.argv[1], timeout=20)
pid = os.fork()
line = ("parent " if pid else "child ") + client.models()[0].name
os.write(1, line.encode() + b"\\n")  # in one piece: both write to the same pipe
if pid == 0:
    os._exit(0)
sys.exit(os.waitpid(pid, 0)[1])
"""


def test_a_client_made_before_a_fork_works_on_both_sides(server):
    command = [sys.executable, "-c", _FORKING, server.target]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, sorted(done.stdout.split("\n"))) == (0, ["", "child models/mini", "parent models/mini"])


def test_another_process_gets_a_channel_of_its_own():
    from underpaint._channel import Owned

    owner = ["parent"]
    owned = Owned(object, lambda: owner[0])
    mine = owned.get()
    assert owned.get() is mine
    owner[0] = "child"
    other = owned.get()
    assert other is not mine
    owner[0] = "grandchild"
    assert owned.take() is None  # not its own: must not be closed here


def test_a_channel_opens_once_for_many_threads(server, photo):
    client = Client(server.target)
    results = []
    threads = [threading.Thread(target=lambda: results.append(client.edit(photo, "t"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()
    assert len({result.image_bytes for result in results}) == 1
    assert len(results) == 8


def test_closing_twice_is_fine(server, kind):
    from underpaint import AsyncClient

    if kind == "sync":
        with Client(server.target) as client:
            client.models()
        client.close()
    else:

        async def use():
            async with AsyncClient(server.target) as client:
                await client.models()
            await client.close()

        asyncio.run(use())
