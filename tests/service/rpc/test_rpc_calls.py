"""Around every call: one log line, the metrics, and no secret of ours in an answer."""

from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.front import Wire, edit, overdue, photo, refused, started
from support.waiting import until
from underpaint.v1 import edit_service_pb2, inversion_service_pb2, model_service_pb2


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


async def test_a_call_is_one_line(wire: Wire, lines: list[Any]) -> None:
    request_id = str(uuid4())
    await wire.edits.Edit(edit("diffedit", request_id=request_id))
    (line,) = [line for line in lines if line["event"] == "rpc"]
    assert line.pop("duration_s") > 0
    assert line == {
        "event": "rpc", "log_level": "info", "rpc": "underpaint.v1.EditService/Edit", "method": "diffedit",
        "model": "mini", "code": "OK", "reason": "",
    }  # fmt: skip


async def test_refusals_have_their_reason_in_the_line(wire: Wire, lines: list[Any]) -> None:
    await refused(wire.edits.Edit(edit(model="models/none")))
    (line,) = lines
    assert (line["code"], line["reason"], line["model"]) == ("NOT_FOUND", "MODEL_NOT_FOUND", "none")


async def test_an_id_that_is_none_goes_nowhere(wire: Wire, lines: list[Any]) -> None:
    refusal = await refused(wire.edits.Edit(edit(request_id="0" * 20_000)))
    assert refusal.paths == ["request_id"]
    drawn = refusal.details["RequestInfo"].request_id
    assert UUID(drawn).version == 4
    assert "00000000" not in repr(refusal)
    assert "00000000" not in repr(lines)


async def test_names_in_the_line_are_cut(wire: Wire, lines: list[Any]) -> None:
    await refused(wire.edits.Edit(edit(model="models/" + "m" * 20_000)))
    (line,) = lines
    assert line["model"].startswith("mmmm")
    assert len(line["model"]) < 100


async def test_a_bug_is_told_to_the_log_and_not_to_the_caller(wire: Wire, lines: list[Any]) -> None:
    wire.engine.refusals = [ZeroDivisionError("the secret of the house")]  # type: ignore[list-item]
    refusal = await refused(wire.edits.Edit(edit()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "BUG")
    assert "secret" not in repr(refusal)
    assert refusal.details["RequestInfo"].request_id in refusal.message
    error = next(line for line in lines if line["log_level"] == "error")
    assert isinstance(error["exc_info"], ZeroDivisionError)
    await wire.edits.Edit(edit())


async def test_probes_are_not_worth_a_line(wire: Wire, lines: list[Any]) -> None:
    await health_pb2_grpc.HealthStub(wire.channel).Check(health_pb2.HealthCheckRequest())
    assert [line["log_level"] for line in lines] == ["debug"]


def count(wire: Wire, rpc: str, code: str, reason: str = "", method: str = "") -> float:
    return wire.metric("underpaint_requests_total", rpc=rpc, method=method, code=code, reason=reason)


async def test_calls_are_counted_by_outcome(wire: Wire) -> None:
    await wire.edits.Edit(edit("ddim"))
    await refused(wire.edits.Edit(edit("ddim", guidance_scale=99)))
    mask = edit_service_pb2.ComputeMaskRequest(edit=edit("diffedit"))
    await wire.edits.ComputeMask(mask)
    edict = inversion_service_pb2.InversionParameters(edict=inversion_service_pb2.EdictInversion())
    invert = inversion_service_pb2.InvertRequest(image=photo(), parameters=edict)
    await wire.inversions.Invert(invert)
    await wire.models.ListModels(model_service_pb2.ListModelsRequest())
    assert count(wire, "Edit", "OK", method="ddim") == 1
    assert count(wire, "Edit", "INVALID_ARGUMENT", "FIELD_INVALID", "ddim") == 1
    assert count(wire, "ComputeMask", "OK", method="mask") == 1
    assert count(wire, "Invert", "OK", method="invert_edict") == 1
    assert count(wire, "ListModels", "OK") == 1
    labels = {"grpc_service": "underpaint.v1.EditService", "grpc_method": "Edit", "grpc_type": "unary"}
    assert wire.metric("grpc_server_started_total", **labels) == 2
    assert wire.metric("grpc_server_handled_total", grpc_code="OK", **labels) == 1


@pytest.mark.parametrize(("code", "reason"), [("CANCELLED", "CANCELLED"), ("DEADLINE_EXCEEDED", "DEADLINE_PASSED")])
async def test_leaving_is_counted_for_what_it_is(wire: Wire, code: str, reason: str) -> None:
    wire.engine.held = True
    if code == "CANCELLED":
        call = wire.edits.Edit(edit("ddim"))
        await wire.engine.submitted.wait()
        call.cancel()
    else:
        await overdue(wire, lambda timeout_s: wire.edits.Edit(edit("ddim"), timeout=timeout_s))
    await until(lambda: count(wire, "Edit", code, reason, "ddim"))
    await until(lambda: wire.engine.cancelled == wire.engine.handles)


async def test_sizes_and_first_events_are_measured(wire: Wire) -> None:
    request = edit_service_pb2.StreamEditRequest(edit=edit("sdedit"))
    messages = [message async for message in wire.edits.StreamEdit(request)]
    assert wire.metric("underpaint_request_message_bytes_sum", rpc="StreamEdit") == request.ByteSize()
    assert wire.metric("underpaint_response_message_bytes_sum", rpc="StreamEdit") == sum(
        message.ByteSize() for message in messages
    )
    assert wire.metric("underpaint_response_message_bytes_count", rpc="StreamEdit") == len(messages)
    assert wire.metric("underpaint_time_to_first_event_seconds_count", method="sdedit") == 1
    assert wire.metric("underpaint_image_pixels_sum") == 64 * 48


async def test_a_call_outlives_the_age_of_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("underpaint_server.rpc.server._MINUTE_MS", 40)  # connections end after 0.2 s instead of 5 min
    peers = set()

    async def look(self: Any, request: Any, context: Any) -> model_service_pb2.ListModelsResponse:
        peers.add(context.peer())
        return model_service_pb2.ListModelsResponse()

    monkeypatch.setattr("underpaint_server.rpc.services.models.ModelService.ListModels", look)
    async with started() as wire:
        wire.engine.held = True
        long = wire.edits.Edit(edit())
        await wire.engine.submitted.wait()
        while len(peers) < 10:  # many connections later
            await wire.models.ListModels(model_service_pb2.ListModelsRequest())
        wire.engine.finish(wire.engine.handles[0])
        assert (await long).image.content
