"""What the server says of itself: models, limits, health, reflection, and what it does not offer."""

import asyncio
import struct
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support import http2
from support.front import MINI, Wire, edit, refused
from support.waiting import PATIENCE_S, until
from underpaint.v1 import direction_service_pb2, edit_service_pb2, model_service_pb2
from underpaint_server.dispatch.supervisor import EngineState
from underpaint_server.jobs import Exactness

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_model_tells_its_limits(wire: Wire) -> None:
    answer = await wire.models.GetModel(model_service_pb2.GetModelRequest(name="models/mini"))
    assert answer.model == model_service_pb2.Model(
        name="models/mini",
        state=model_service_pb2.MODEL_STATE_READY,
        digest="d" * 64,
        methods=["sdedit", "ddim", "edict", "diffedit", "disentangled", "content_injection"],
        limits=model_service_pb2.Limits(
            max_image_bytes=60_000,
            max_image_pixels=512 * 512,
            max_steps=50,
            max_batch_size=16,
            max_prompt_chars=100,
            size_multiple=8,
            max_mask_samples=16,
        ),
        width=64,
        height=48,
        default_steps=20,
        feature_sites=["mid", "up_0", "up_1"],
        prompt_tokens=77,
        exact_batching=model_service_pb2.EXACT_BATCHING_ANY_SIZE,
        backend="torch",
    )


async def test_a_model_tells_in_which_passes_equal_requests_have_equal_bits(wire: Wire) -> None:
    for exactness, batch_class in ((Exactness.FIXED_SIZE, 4), (Exactness.ROW_BY_ROW, None), (Exactness.INEXACT, 2)):
        info = replace(MINI, exactness=exactness, batch_class=batch_class, backend="openvino")
        wire.engine.models = {"mini": info}
        model = (await wire.models.GetModel(model_service_pb2.GetModelRequest(name="models/mini"))).model
        name = model_service_pb2.ExactBatching.Name(model.exact_batching)
        assert name.removeprefix("EXACT_BATCHING_") == exactness.name
        assert (model.batch_class, model.backend) == (batch_class or 0, "openvino")


async def test_a_schedule_of_few_levels_limits_the_steps_of_every_request(wire: Wire) -> None:
    """More steps than levels would do nothing in some of them."""
    wire.engine.models = {"mini": replace(MINI, max_steps=10, default_steps=10)}
    model = (await wire.models.GetModel(model_service_pb2.GetModelRequest(name="models/mini"))).model
    assert (model.limits.max_steps, model.default_steps) == (10, 10)
    requests = {
        "inversion_parameters.steps": edit("edict", inversion_parameters={"steps": 11}),
        "sdedit.steps": edit("sdedit", sdedit={"steps": 11}),
        "generated.steps": edit("ddim", generated={"steps": 11}),
        "disentangled.steps": edit("disentangled", disentangled={"switch_step": 1, "steps": 11}),
    }
    for path, request in requests.items():
        assert (await refused(wire.edits.Edit(request))).paths == [path]
    many = edit("disentangled", disentangled={"given": {"values": [1.0] * 11}})
    assert (await refused(wire.edits.Edit(many))).paths == ["disentangled.given.values"]
    direction: dict[str, Any] = {"source_prompt": "a", "target_prompt": "b", "steps": 11}
    examples: list[Any] = [{"seed": 1}]
    learn = direction_service_pb2.LearnDirectionRequest(direction=direction, examples=examples)  # type: ignore[arg-type]
    assert (await refused(wire.directions.LearnDirection(learn))).paths == ["direction.steps"]
    assert wire.engine.jobs == []
    answer = await wire.edits.Edit(edit("sdedit", sdedit={"steps": 10}))
    assert answer.resolved.sdedit.steps == 10


async def test_models_are_listed_default_first_in_pages(wire: Wire) -> None:
    request = model_service_pb2.ListModelsRequest(page_size=1)
    first = await wire.models.ListModels(request)
    request.page_token = first.next_page_token
    second = await wire.models.ListModels(request)
    assert [model.name for page in (first, second) for model in page.models] == ["models/mini", "models/other"]
    assert second.next_page_token == ""
    request.page_token = "mine"
    assert (await refused(wire.models.ListModels(request))).paths == ["page_token"]


@pytest.mark.parametrize(("name", "reason"), [("models/none", "MODEL_NOT_FOUND"), ("mini", "FIELD_INVALID")])
async def test_no_such_model(wire: Wire, name: str, reason: str) -> None:
    assert (await refused(wire.models.GetModel(model_service_pb2.GetModelRequest(name=name)))).reason == reason


def loading(wire: Wire) -> None:
    wire.engine.state, wire.engine.models = EngineState.STARTING, {}


async def test_while_loading_calls_are_told_to_come_back(wire: Wire) -> None:
    loading(wire)
    refusal = await refused(wire.edits.Edit(edit()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING")
    assert "grpc-retry-pushback-ms" in refusal.trailers
    answer = await wire.models.GetModel(model_service_pb2.GetModelRequest(name="models/mini"))
    assert answer.model.state == model_service_pb2.MODEL_STATE_LOADING


async def test_a_model_that_failed_to_load_says_why(wire: Wire) -> None:
    wire.engine.state, wire.engine.models, wire.engine.error = EngineState.FAILED, {}, "no weights there"
    refusal = await refused(wire.edits.Edit(edit()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_READY")
    assert "no weights there" in refusal.message
    model = (await wire.models.GetModel(model_service_pb2.GetModelRequest(name="models/mini"))).model
    assert (model.state, model.error) == (model_service_pb2.MODEL_STATE_FAILED, "no weights there")


async def test_a_bad_model_among_several_is_told_and_the_others_are_served(wire: Wire) -> None:
    wire.engine.models, wire.engine.errors = {"other": wire.engine.models["other"]}, {"mini": "no weights there"}
    for _ in range(2):
        refusal = await refused(wire.edits.Edit(edit()))  # mini is the default
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_READY")
        assert "no weights there" in refusal.message
        assert refusal.details["PreconditionFailure"].violations[0].subject == "models/mini"
    assert (await wire.edits.Edit(edit(model="models/other"))).image.content
    listed = (await wire.models.ListModels(model_service_pb2.ListModelsRequest())).models
    assert [(model.state, model.error) for model in listed] == [
        (model_service_pb2.MODEL_STATE_FAILED, "no weights there"),
        (model_service_pb2.MODEL_STATE_READY, ""),
    ]
    health = await health_of(wire)
    assert set(health.values()) == {SERVING}


async def health_of(wire: Wire) -> dict[str, Any]:
    wire.health.update()
    stub = health_pb2_grpc.HealthStub(wire.channel)
    names = ("", "startup", "readiness", "liveness", "underpaint.v1.EditService")
    return {name: (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in names}


@pytest.mark.parametrize(
    ("change", "startup", "ready", "alive"),
    [
        ({}, True, True, True),
        ({"state": EngineState.STARTING, "models": {}}, False, False, True),
        ({"state": EngineState.RESTARTING}, True, False, True),
        ({"stalled": True}, True, True, False),
        ({"state": EngineState.FAILED, "models": {}}, False, False, False),
    ],
    ids=["ready", "starting", "restarting", "stalled", "failed"],
)
async def test_health_follows_the_engine(
    wire: Wire, change: dict[str, Any], startup: bool, ready: bool, alive: bool
) -> None:
    for name, value in change.items():
        setattr(wire.engine, name, value)
    status = {True: SERVING, False: NOT_SERVING}
    assert await health_of(wire) == {
        "": status[ready],
        "readiness": status[ready],
        "underpaint.v1.EditService": status[ready],
        "startup": status[startup],
        "liveness": status[alive],
    }


async def test_a_draining_server_is_alive_and_not_ready(wire: Wire) -> None:
    wire.context.draining = True
    health = await health_of(wire)
    assert (health["readiness"], health["liveness"], health["startup"]) == (NOT_SERVING, SERVING, SERVING)
    model = (await wire.models.GetModel(model_service_pb2.GetModelRequest(name="models/mini"))).model
    assert model.state == model_service_pb2.MODEL_STATE_DRAINING


async def test_a_server_that_cannot_tell_its_health_is_not_alive(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    watching = asyncio.create_task(wire.health.watch())
    watch = health_pb2_grpc.HealthStub(wire.channel).Watch(health_pb2.HealthCheckRequest(service="liveness"))
    assert (await watch.read()).status == SERVING
    monkeypatch.delattr(wire.engine, "stalled")
    assert (await watch.read()).status == NOT_SERVING
    monkeypatch.undo()
    assert (await watch.read()).status == SERVING
    watching.cancel()


async def test_watchers_hear_of_changes(wire: Wire) -> None:
    watching = asyncio.create_task(wire.health.watch())
    watch = health_pb2_grpc.HealthStub(wire.channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
    assert (await watch.read()).status == SERVING
    wire.context.draining = True
    assert (await watch.read()).status == NOT_SERVING
    watch.cancel()
    watching.cancel()


async def test_a_watcher_who_reads_nothing_holds_up_no_status(wire: Wire) -> None:
    no_room = http2.frame(http2.SETTINGS, 0, 0, struct.pack(">HI", 4, 0))
    host, _, port = wire.address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(http2.PREFACE + no_room + http2.call(b"/grpc.health.v1.Health/Watch", http2.message(b"")))
    labels = {"grpc_type": "server_stream", "grpc_service": "grpc.health.v1.Health", "grpc_method": "Watch"}
    await until(lambda: wire.metric("grpc_server_started_total", **labels))
    await asyncio.sleep(0.2)
    watching = asyncio.create_task(wire.health.watch())
    watch = health_pb2_grpc.HealthStub(wire.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    async with asyncio.timeout(PATIENCE_S):
        wire.context.draining = True
        assert (await watch.read()).status == NOT_SERVING
    watching.cancel()
    writer.close()


async def test_health_of_all_names_is_listed(wire: Wire) -> None:
    listed = await health_pb2_grpc.HealthStub(wire.channel).List(health_pb2.HealthListRequest())
    services = (f"underpaint.v1.{name}Service" for name in ("Edit", "Inversion", "Direction"))
    names = ("", "startup", "readiness", "liveness", *services)
    assert {name: answer.status for name, answer in listed.statuses.items()} == dict.fromkeys(names, SERVING)


async def test_an_unknown_health_name_is_not_found(wire: Wire) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health_pb2_grpc.HealthStub(wire.channel).Check(health_pb2.HealthCheckRequest(service="x"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services(wire: Wire) -> None:
    async def ask() -> Any:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    (answer,) = [a async for a in reflection_pb2_grpc.ServerReflectionStub(wire.channel).ServerReflectionInfo(ask())]
    names = {service.name for service in answer.list_services_response.service}
    assert names == {
        "google.longrunning.Operations",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "underpaint.v1.DirectionService",
        "underpaint.v1.EditService",
        "underpaint.v1.InversionService",
        "underpaint.v1.ModelService",
    }


async def test_what_is_in_the_contract_but_not_here_says_so(wire: Wire) -> None:
    m = model_service_pb2

    calls = [
        wire.edits.SubmitEdit(edit_service_pb2.SubmitEditRequest(edit=edit())),
        wire.models.LoadModel(m.LoadModelRequest(name="models/mini")),
        wire.models.UnloadModel(m.UnloadModelRequest(name="models/mini")),
    ]
    refusals = [await refused(call) for call in calls]
    assert {(r.code, r.reason) for r in refusals} == {(grpc.StatusCode.UNIMPLEMENTED, "METHOD_DISABLED")}
    assert wire.engine.jobs == []
