"""A call that fails because the server is not there for it is sent again, until its timeout passes."""

import asyncio
import logging
import re
import threading
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from support.waiting import PATIENCE_S
from underpaint import AsyncClient, Client, _calls, errors
from underpaint._retry import _Backoff
from underpaint.v1 import direction_service_pb2, edit_service_pb2, types_pb2

MIB = 1 << 20
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def busy(refusal, seconds=0.001, reason="QUEUE_FULL"):
    delay = Duration()
    delay.FromNanoseconds(round(seconds * 1e9))
    return refusal(UNAVAILABLE, reason, "come back", error_details_pb2.RetryInfo(retry_delay=delay))


@pytest.mark.parametrize("rpc", ["Edit", "StreamEdit"])
@pytest.mark.parametrize("size", [1, 5 * MIB])
def test_a_refused_request_is_repeated_under_the_same_id(client, server, refusal, photo, rpc, size):
    server.script(rpc, busy(refusal), busy(refusal))
    client.edit(photo + bytes(size), "t", progress=[].append if rpc == "StreamEdit" else None)
    ids = {getattr(request, "edit", request).request_id for request in server.named(rpc)}
    assert len(server.named(rpc)) == 3
    assert len(ids) == 1


@pytest.mark.parametrize("rpc", ["Edit", "StreamEdit"])
def test_refusals_are_outlasted_however_many_they_are(client, server, refusal, photo, rpc):
    server.script(rpc, *[busy(refusal)] * 30)
    assert client.edit(photo, "t", progress=[].append if rpc == "StreamEdit" else None).image.size == (8, 8)
    assert len(server.named(rpc)) == 31


def test_refusals_without_end_become_an_error_that_tells_of_them(client, server, refusal, photo):
    server.script("Edit", *[busy(refusal, 0.1)] * 1000)
    expected = errors.QueueFull, errors.DeadlinePassed  # the second where the last attempt was under way
    with pytest.raises(expected, match=r"attempt.*come back|come back.*attempt") as told:
        client.edit(photo, "t", timeout=2)
    if isinstance(told.value, errors.QueueFull):
        assert re.search(r"come back \(\d+ attempts in .* s; the timeout leaves no time", str(told.value))
        assert told.value.retry_after_s == 0.1
    assert str(told.value) == told.value.message


def test_a_server_that_asks_for_more_time_than_is_left_ends_the_call_at_once(client, server, refusal, photo):
    server.script("Edit", busy(refusal, 100_000))
    with pytest.raises(errors.QueueFull) as told:
        client.edit(photo, "t")
    assert told.value.message == "come back"
    assert len(server.named("Edit")) == 1


def test_the_servers_retry_time_is_waited_for(client, server, refusal, photo):
    server.script("Edit", busy(refusal, 0.5), busy(refusal, 0.5))
    client.edit(photo, "t")
    first, second, third = server.times
    assert second - first >= 0.5
    assert third - second >= 0.5


@pytest.mark.parametrize("seconds", [0, -1])
def test_a_retry_time_that_is_none_does_not_make_the_client_spin(client, server, refusal, photo, seconds):
    server.script("Edit", *[busy(refusal, seconds)] * 4)
    client.edit(photo, "t")
    assert server.times[-1] - server.times[0] >= 1.5  # half of 0.2, 0.4, 0.8 and 1.6


def test_pauses_grow_while_attempts_fail_at_once_and_begin_anew_after_one_that_lasted():
    backoff = _Backoff()
    limits = [0.2, 0.4, 0.8, 1.6, 3.2, 5, 5]
    assert all(limit / 2 <= backoff.next(0.01) <= limit for limit in limits)
    assert all(backoff.next(1.5) <= 0.2 for _ in range(9))
    assert 0.2 <= backoff.next(0.01) <= 0.4


@pytest.mark.parametrize("retries", [0, 2])
def test_retries_can_be_limited_and_turned_off(connect, server, refusal, photo, retries):
    client = connect(server.target, max_retries=retries)
    server.script("Edit", *[busy(refusal)] * 9)
    with pytest.raises(errors.QueueFull, match="come back") as told:
        client.edit(photo, "t")
    assert len(server.named("Edit")) == 1 + retries
    assert ("max_retries is 2" in told.value.message) is (retries == 2)
    with pytest.raises(ValueError, match="max_retries"):
        connect(server.target, max_retries=-1)


@pytest.mark.parametrize("rpc", ["Invert", "ListModels", "DeleteInversion", "ComputeMask", "ExportInversion"])
def test_every_call_is_repeated(client, server, refusal, photo, rpc):
    inversion = client.invert(photo)
    before = len(server.named(rpc))
    server.script(rpc, busy(refusal, reason="DRAINING"))
    calls = {
        "Invert": (client.invert, photo),
        "ListModels": (client.models,),
        "DeleteInversion": (client.delete_inversion, inversion),
        "ComputeMask": (client.compute_mask, photo, "t"),
        "ExportInversion": (client.export_inversion, inversion),
    }
    call, *arguments = calls[rpc]
    call(*arguments)
    assert len(server.named(rpc)) - before >= 2


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (grpc.StatusCode.INTERNAL, "BUG", errors.Bug),
        (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID", errors.FieldInvalid),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_UNATTAINABLE", errors.DeadlineUnattainable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "GPU_OUT_OF_MEMORY", errors.OutOfMemory),
        (grpc.StatusCode.UNKNOWN, "", errors.ServerError),
        (grpc.StatusCode.CANCELLED, "", errors.Cancelled),
    ],
)
@pytest.mark.parametrize("rpc", ["Edit", "StreamEdit"])
def test_other_errors_are_not_repeated(client, server, refusal, photo, code, reason, kind, rpc):
    server.script(rpc, refusal(code, reason))
    with pytest.raises(kind):
        client.edit(photo, "t", progress=[].append if rpc == "StreamEdit" else None)
    assert len(server.named(rpc)) == 1


def test_a_client_that_was_refused_for_long_retries_as_before(client, server, refusal, photo):
    for _ in range(12):
        server.script("Edit", *[busy(refusal)] * 12)
        client.edit(photo, "t")
    assert len(server.named("Edit")) == 12 * 13


def test_a_server_that_comes_back_is_waited_for(connect, photo, server):
    client = connect(server.target)
    client.edit(photo, "t")
    server.stop()
    again = []
    restart = threading.Timer(4, lambda: again.append(type(server)(server.target)))
    restart.start()
    try:
        assert client.edit(photo, "u").image.size == (8, 8)
    finally:
        restart.join()
        again[0].stop()
    assert len(again[0].named("Edit")) == 1


@pytest.mark.parametrize("progress", [None, print])
def test_a_server_that_is_gone_is_told_with_the_channels_reason(connect, photo, server, progress):
    client = connect(server.target)
    client.edit(photo, "t")
    server.stop()
    with pytest.raises(errors.ConnectionFailed, match="no server answers at 127") as told:
        client.edit(photo, "t", timeout=3, progress=progress)
    assert re.search(r"refused.* \(\d+ attempts in ", told.value.message)
    assert "last error" not in told.value.message


def test_a_connection_that_breaks_inside_a_call_is_told_when_the_server_stays_away(connect, photo, server):
    def dies(request, context):
        threading.Thread(target=server.stop).start()
        server.cancelled.wait(PATIENCE_S)

    client = connect(server.target)
    client.edit(photo, "t")
    server.script("Edit", dies)
    with pytest.raises(errors.ConnectionFailed, match="no server answers at 127"):
        client.edit(photo, "t", timeout=3)
    server.cancelled.set()


def test_a_timeout_after_a_retry_tells_of_the_failure_before(client, server, refusal, photo):
    release = threading.Event()

    def slow(request, context):
        release.wait(PATIENCE_S)
        return edit_service_pb2.EditResponse()

    server.script("Edit", busy(refusal, reason="WORKER_RESTARTED"), slow)
    with pytest.raises(errors.DeadlinePassed, match=r"attempt 2; the one before failed: come back"):
        client.edit(photo, "t", timeout=3)
    release.set()


def test_retries_are_logged_with_their_reason(client, server, refusal, photo, caplog):
    caplog.set_level(logging.INFO, "underpaint")
    server.script("Edit", busy(refusal, 0.25))
    client.edit(photo, "t", request_id="6e2f9d9c-5c8f-4a0c-9b43-0d8f4f1f7a11")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "underpaint"]
    assert re.fullmatch(r"Edit 6e2f9d9c-\S+: QUEUE_FULL: come back; attempt 2 in 0\.\d+ s", line)


# --- streams ------------------------------------------------------------------------------------------------------


def test_a_stream_that_breaks_begins_anew_and_progress_goes_on(client, server, refusal, photo):
    def breaks(request, context):
        yield edit_service_pb2.StreamEditResponse(accepted=edit_service_pb2.Accepted())
        progress = types_pb2.Progress(phase=types_pb2.PHASE_DENOISING, step=3, total_steps=4, fraction=0.75)
        yield edit_service_pb2.StreamEditResponse(progress=progress)
        busy(refusal, reason="WORKER_RESTARTED")(request, context)

    server.script("StreamEdit", breaks, breaks)
    seen: list[Any] = []
    streamed = client.edit(photo, "t", seed=1, progress=seen.append)
    assert streamed.image_bytes == client.edit(photo, "t", seed=1).image_bytes
    assert len({request.edit.request_id for request in server.named("StreamEdit")}) == 1
    assert [each.step for each in seen] == [0, 3, 0, 3, 0, 1, 2, 3, 4]
    assert [each.fraction for each in seen] == [0, *[0.75] * 7, 1]


def test_a_file_whose_stream_breaks_is_read_from_its_start_again(client, server, refusal, photo, exported):
    def breaks(request, context):
        yield next(exported(server.latents, crc32c=0))
        busy(refusal, reason="STORE_UNAVAILABLE")(request, context)

    inversion = client.invert(photo)
    server.script("ExportInversion", breaks, breaks)
    assert client.export_inversion(inversion) == server.latents


def test_a_callback_that_fails_in_a_call_of_its_own_is_not_taken_for_the_server(client, server, photo):
    class Elsewhere(grpc.RpcError):
        def code(self):
            return UNAVAILABLE

    def listener(progress):
        raise Elsewhere

    with pytest.raises(Elsewhere):
        client.edit(photo, "t", progress=listener)
    assert len(server.named("StreamEdit")) == 1


# --- calls that change something and have no request id -----------------------------------------------------------


def lost(server, act):
    """It does what is asked, and the connection breaks before the answer."""

    def behave(request, context):
        act(request, context)
        context.abort(UNAVAILABLE, "Socket closed")

    return behave


def test_a_deletion_whose_answer_was_lost_is_done(client, server, photo):
    inversion = client.invert(photo)
    server.script("DeleteInversion", lost(server, server._delete_inversion))
    client.delete_inversion(inversion)
    assert len(server.named("DeleteInversion")) == 2
    with pytest.raises(errors.InversionExpired):
        client.delete_inversion(inversion)


def test_a_deletion_that_was_refused_before_finds_nothing_to_delete(client, server, refusal):
    server.script("DeleteInversion", busy(refusal, reason="DRAINING"))
    with pytest.raises(errors.InversionExpired):
        client.delete_inversion("inversions/" + 64 * "0")


@pytest.mark.parametrize("name", ["", "joy"])
@pytest.mark.parametrize("is_lost", [False, True])
def test_an_import_whose_answer_was_lost_finds_what_it_stored(name, is_lost):
    flow = _calls.import_direction(b"file", name, "")
    sent: Any = next(flow).request
    exists = errors.DirectionExists("there is one")
    exists._answer_lost = is_lost
    if not is_lost:
        with pytest.raises(errors.DirectionExists):
            flow.throw(exists)
        return
    request: Any = flow.throw(exists).request
    if name:
        assert request.name == "directions/joy"
        request = flow.send(b"file").request
    assert request.name == sent.header.name
    stored = direction_service_pb2.Direction(name=request.name)
    with pytest.raises(StopIteration) as end:
        flow.send(direction_service_pb2.GetDirectionResponse(direction=stored))
    assert end.value.value.name == sent.header.name


def test_an_import_does_not_take_the_direction_of_another_for_its_own():
    flow = _calls.import_direction(b"file", "joy", "")
    next(flow)
    exists = errors.DirectionExists("there is one")
    exists._answer_lost = True
    flow.throw(exists)
    with pytest.raises(errors.DirectionExists):
        flow.send(b"another")


# --- the end of waiting -------------------------------------------------------------------------------------------


def test_closing_ends_a_call_that_waits_for_its_next_attempt(kind, server, refusal, photo):
    server.script("Edit", busy(refusal, 3000))
    if kind == "sync":
        client = Client(server.target, timeout=9000)

        def close():
            _arrived(server)
            client.close()

        closing = threading.Thread(target=close)
        closing.start()
        with pytest.raises(errors.Cancelled, match="closed"):
            client.edit(photo, "t")
        closing.join()
    else:

        async def use():
            client = AsyncClient(server.target, timeout=9000)
            task = asyncio.create_task(client.edit(photo, "t"))
            await asyncio.to_thread(_arrived, server)
            await client.close()
            with pytest.raises(errors.Cancelled, match="closed"):
                await task

        asyncio.run(use())
    assert len(server.named("Edit")) == 1


def test_cancelling_a_task_ends_its_retries(server, refusal, photo):
    server.script("Edit", busy(refusal, 3000))

    async def abandon():
        async with AsyncClient(server.target, timeout=9000) as client:
            task = asyncio.create_task(client.edit(photo, "t"))
            await asyncio.to_thread(_arrived, server)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(abandon())
    assert len(server.named("Edit")) == 1


def _arrived(server):
    """Wait until the client has been refused and the refusal has had time to arrive."""
    pause = threading.Event()
    while not server.named("Edit"):
        pause.wait(0.01)
    pause.wait(0.5)
