"""The server from its first second to its last: loading, ready, crashed, broken, draining."""

import asyncio
import re
import signal
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from e2e.harness import (
    ENDLESS,
    Samples,
    Stubs,
    disc,
    engine_of,
    engines,
    eventually,
    gone,
    idle,
    masking,
    queued,
    result,
    running,
    scrape,
    stubs,
    until,
)
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.front import edit, refusal, refused
from support.waiting import PATIENCE_S
from underpaint import AsyncClient, Client, DiffEdit, Phase, Progress, SdEdit
from underpaint.v1 import edit_service_pb2, model_service_pb2
from underpaint_server.local_server import LocalServer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
WAIT = signal.SIGCONT
"""Changes nothing: the server has been told to stop already, and only its end is waited for."""
NAMES = (
    "startup", "readiness", "liveness", "", "underpaint.v1.EditService", "underpaint.v1.InversionService",
    "underpaint.v1.DirectionService",
)  # fmt: skip
ONE_AT_A_TIME: dict[str, Any] = {
    "models": "toy=toy:",
    "max_running": 1,
    "max_batch_size": 2,
    "max_mask_samples": 10_000,
}


async def test_health_and_refusals_tell_loading_from_ready() -> None:
    with LocalServer(models="toy=toy:", wait_ready=False) as server:
        engine = engine_of(server)
        engine.suspend()  # so that loading lasts
        async with stubs(server) as wire:
            assert await _health(wire) == {name: name == "liveness" for name in NAMES}
            refusal = await refused(wire.edits.Edit(edit()))
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING")
            assert int(refusal.trailers["grpc-retry-pushback-ms"]) > 0
            assert (await _model(wire)).state == model_service_pb2.MODEL_STATE_LOADING
            async with AsyncClient(server.target) as client:
                patient = asyncio.create_task(client.edit(disc(), "a corgi", SdEdit(), timeout=PATIENCE_S))
                watch = wire.health.Watch(health_pb2.HealthCheckRequest(service="readiness"))
                assert (await watch.read()).status == NOT_SERVING
                engine.resume()
                await until(watch, lambda health: health.status == SERVING)
                assert (await patient).image.size == (32, 32)
            assert await _health(wire) == dict.fromkeys(NAMES, True)
            assert (await _model(wire)).state == model_service_pb2.MODEL_STATE_READY


async def test_a_killed_engine_costs_the_calls_inside_it_one_retry_and_the_queued_ones_nothing() -> None:
    with LocalServer(**ONE_AT_A_TIME) as server:
        first = engine_of(server)
        async with stubs(server) as wire, running(wire, masking()) as lost:
            waiting = await queued(wire, edit("sdedit"))
            watch = wire.health.Watch(health_pb2.HealthCheckRequest(service="readiness"))
            await until(watch, lambda health: health.status == SERVING)  # probes are told within half a second
            first.kill()
            refusal = await _end(lost)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_RESTARTED")
            assert int(refusal.trailers["grpc-retry-pushback-ms"]) > 0
            await until(watch, lambda health: health.status == NOT_SERVING)
            await until(watch, lambda health: health.status == SERVING)
            assert (await result(waiting)).image.content
            assert await _health(wire) == dict.fromkeys(NAMES, True)
            assert (await wire.edits.Edit(edit("edict"))).image.content
        assert engine_of(server).pid != first.pid
        now = await idle(server)
        assert now.by("underpaint_engine_restarts_total", "reason") == {"crash": 1, "stall": 0}


async def test_our_clients_come_through_a_crash_without_knowing() -> None:
    with LocalServer(models="toy=toy:", max_batch_size=2, max_mask_samples=10_000) as server:
        seen: list[Progress] = []

        def edit(client: Any, seed: int, progress: Any = None) -> Any:
            return client.edit(disc(), "a corgi", SdEdit(), seed=seed, progress=progress, timeout=PATIENCE_S)

        def mask(client: Any) -> Any:
            return client.compute_mask(disc(), "a corgi", DiffEdit(samples=200), seed=5, timeout=PATIENCE_S)

        with Client(server.target) as blocking:
            async with AsyncClient(server.target) as client:
                engine = engine_of(server)
                engine.suspend()  # so that all are inside when it is killed
                calls = [
                    edit(client, 1),
                    edit(client, 2, seen.append),
                    asyncio.to_thread(edit, blocking, 3),
                    asyncio.to_thread(edit, blocking, 4, seen.append),
                    mask(client),
                ]
                tasks = [asyncio.ensure_future(call) for call in calls]
                await eventually(lambda: scrape(server).sum("underpaint_num_requests_running") == len(calls))
                engine.kill()
                *edited, masked = await asyncio.gather(*tasks)
                again = [await edit(client, seed) for seed in (1, 2, 3, 4)]
                assert [one.image_bytes for one in edited] == [one.image_bytes for one in again]
                assert masked.mask_bytes == (await mask(client)).mask_bytes
        assert sum(one.phase is Phase.QUEUED for one in seen) >= 4  # two streams, each admitted twice
        assert (await idle(server)).sum("underpaint_engine_restarts_total") == 1


async def test_our_clients_come_through_a_stopped_engine_without_knowing() -> None:
    masks = (DiffEdit(samples=300), DiffEdit(samples=200))
    with LocalServer(models="toy=toy:", max_batch_size=2, max_mask_samples=10_000, stall_s=5) as server:
        async with stubs(server) as wire, AsyncClient(server.target, timeout=PATIENCE_S) as client:
            engine_of(server).suspend()
            answers = await asyncio.gather(*(client.compute_mask(disc(), "a corgi", mask, seed=1) for mask in masks))
            again = await client.compute_mask(disc(), "a corgi", masks[0], seed=1)
            assert answers[0].mask_bytes == again.mask_bytes
            assert await wire.serves("readiness")
        assert (await idle(server)).sum("underpaint_engine_restarts_total") >= 1


async def test_a_model_that_cannot_load_is_told_and_the_server_stays_to_tell_it(tmp_path: Path) -> None:
    with LocalServer(models=f"broken={tmp_path}", wait_ready=False) as server:
        server.wait_for("engine failed")
        async with stubs(server) as wire:
            await eventually(lambda: any(e["event"].startswith("models failed") for e in server.events()))
            for _ in range(2):
                told = await refused(wire.edits.Edit(edit()))
                assert (told.code, told.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_READY")
                assert str(tmp_path) in told.message
                assert told.details["PreconditionFailure"].violations[0].subject == "models/broken"
            model = await _model(wire)
            assert model.state == model_service_pb2.MODEL_STATE_FAILED
            assert str(tmp_path) in model.error
            watch = wire.health.Watch(health_pb2.HealthCheckRequest(service="liveness"))
            await until(watch, lambda health: health.status == NOT_SERVING)
            assert await _health(wire) == dict.fromkeys(NAMES, False)
        assert psutil.Process(server.pid).is_running()
        assert scrape(server).sum("underpaint_requests_total", reason="MODEL_NOT_READY") == 2
        assert server.stop() == 0


def test_a_local_server_that_never_gets_ready_says_why_and_is_gone(tmp_path: Path) -> None:
    server = LocalServer(models=f"broken={tmp_path}")
    with pytest.raises(RuntimeError, match=re.escape(str(tmp_path))), server:
        pass
    assert not psutil.pid_exists(server.pid)


async def test_sigterm_lets_running_and_waiting_work_finish_and_takes_nothing_new() -> None:
    with LocalServer(**ONE_AT_A_TIME) as server:
        async with stubs(server) as wire, running(wire, masking(200)) as call:
            engine = engine_of(server)
            engine.suspend()  # so that there is work until all has been asked
            waiting = await queued(wire, edit("sdedit"))
            psutil.Process(server.pid).send_signal(signal.SIGTERM)
            server.wait_for("draining")
            assert not await wire.serves("readiness")
            assert await wire.serves("liveness")
            told = await refused(wire.edits.Edit(edit()))
            assert (told.code, told.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            engine.resume()
            assert (await result(call)).mask.content
            assert (await result(waiting)).image.content
        server.wait_for("stopped")
        assert server.stop(WAIT) == 0


async def test_a_second_signal_ends_at_once_and_tells_the_callers() -> None:
    with LocalServer(**ONE_AT_A_TIME) as server:
        async with stubs(server) as wire, running(wire, masking()) as call:
            front = psutil.Process(server.pid)
            engine = engine_of(server)
            front.send_signal(signal.SIGTERM)
            server.wait_for("draining")
            front.send_signal(signal.SIGINT)
            told = await _end(call)
            assert (told.code, told.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert server.stop(WAIT) == 0
        assert not engine.is_running()


async def test_work_that_outlasts_the_drain_is_given_up() -> None:
    with LocalServer(**ONE_AT_A_TIME, drain_s=0.1) as server:
        async with stubs(server) as wire, running(wire, masking()) as call:
            psutil.Process(server.pid).send_signal(signal.SIGTERM)
            assert (await _end(call)).reason == "DRAINING"
        assert server.stop(WAIT) == 0


@pytest.mark.parametrize("doing", ["loading", "computing", "stopped in a pass"])
async def test_no_engine_outlives_a_killed_front(doing: str) -> None:
    server = LocalServer(models="toy=toy:", max_mask_samples=ENDLESS, wait_ready=doing != "loading", spare_engine=True)
    server.__enter__()
    children = psutil.Process(server.pid).children
    if doing == "loading":
        left = children()
    else:
        await eventually(lambda: len(engines(children())) == 2)
        left = children()
        async with stubs(server) as wire, running(wire, masking()):
            if doing != "computing":
                engines(left)[0].suspend()  # it cannot end by itself
            assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    server.stop(signal.SIGKILL)
    for child in left:
        await asyncio.to_thread(gone, child)
    assert "Traceback" not in server.tail(1000)
    with pytest.raises(RuntimeError, match="status -9"):
        server.__exit__(None, None, None)


async def test_a_spare_engine_takes_over_and_nothing_is_left() -> None:
    with LocalServer(models="toy=toy:", spare_engine=True) as server:
        children = psutil.Process(server.pid).children
        async with stubs(server) as wire:
            for restarts in (1, 2):
                await eventually(lambda: len(engines(children())) == 2)
                first, spare = engines(children())
                first.kill()
                now = await _restarted(server, restarts)
                assert now.sum("underpaint_model_ready", model="toy") == 1
                assert spare in children()
                assert first not in children()
                assert all(child.status() != psutil.STATUS_ZOMBIE for child in children())
            assert (await wire.edits.Edit(edit("edict"))).image.content
        left = children()
        assert server.stop() == 0
        for child in left:
            await asyncio.to_thread(gone, child)


def test_signals_to_the_process_group_leave_it_to_the_front_to_end_its_children() -> None:
    with LocalServer(models="toy=toy:", spare_engine=True, wait_ready=False) as server:
        told: set[psutil.Process] = set()
        while len(engines(told)) < 2:  # the engine, then its spare: each as soon as there is one
            for child in set(psutil.Process(server.pid).children()) - told:
                for number in (signal.SIGINT, signal.SIGTERM):
                    child.send_signal(number)
                told.add(child)
            assert not any(line["event"] in ("engine ended", "spare engine ended") for line in server.events())
        server.wait_for("ready")
        assert all(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in told)
        assert server.stop() == 0
        assert not any(line["level"] in ("warning", "error") for line in server.events())
        assert "Traceback" not in server.tail(1000)
        for child in told:
            gone(child)


async def test_an_engine_that_the_system_refuses_fails_liveness_and_comes_back() -> None:
    with LocalServer(models="toy=toy:") as server:
        front = psutil.Process(server.pid)
        limits = front.rlimit(psutil.RLIMIT_NOFILE)
        async with stubs(server) as wire:
            watch = wire.health.Watch(health_pb2.HealthCheckRequest(service="liveness"))
            await until(watch, lambda health: health.status == SERVING)
            engine = engine_of(server)
            front.rlimit(psutil.RLIMIT_NOFILE, (3, limits[1]))  # none is free, whichever are closed meanwhile
            engine.kill()
            await until(watch, lambda health: health.status == NOT_SERVING)
            front.rlimit(psutil.RLIMIT_NOFILE, limits)
            await until(watch, lambda health: health.status == SERVING)
            assert (await _restarted(server, 1)).sum("underpaint_unexpected_errors_total") >= 3
            assert (await wire.edits.Edit(edit("sdedit"))).image.content


async def test_one_bad_model_among_several_is_told_and_costs_nothing_else(tmp_path: Path) -> None:
    with LocalServer(models=f"broken={tmp_path},toy=toy:") as server:
        async with stubs(server) as wire:
            told = await refused(wire.edits.Edit(edit()))
            assert (told.code, told.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_READY")
            assert str(tmp_path) in told.message
            assert (await wire.edits.Edit(edit(model="models/toy"))).image.content
            model = await _model(wire)
            assert (model.name, model.state) == ("models/broken", model_service_pb2.MODEL_STATE_FAILED)
            assert str(tmp_path) in model.error
            watch = wire.health.Watch(health_pb2.HealthCheckRequest(service="readiness"))
            await until(watch, lambda health: health.status == SERVING)
            assert await _health(wire) == dict.fromkeys(NAMES, True)
        assert scrape(server).by("underpaint_model_ready", "model") == {"broken": 0, "toy": 1}
        assert server.wait_for("model failed to load")["model"] == "broken"


async def test_reflection_lists_what_is_served(toy: LocalServer) -> None:
    async with stubs(toy) as wire:
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(wire.channel).ServerReflectionInfo(iter([ask]))
        answer = await call.read()
    assert {service.name for service in answer.list_services_response.service} == {
        "underpaint.v1.EditService",
        "underpaint.v1.InversionService",
        "underpaint.v1.ModelService",
        "underpaint.v1.DirectionService",
        "google.longrunning.Operations",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_what_the_contract_has_and_this_server_has_not_is_said_to_be_disabled(toy: LocalServer) -> None:
    async with stubs(toy) as wire:
        calls = [
            wire.edits.SubmitEdit(edit_service_pb2.SubmitEditRequest(edit=edit())),
            wire.models.LoadModel(model_service_pb2.LoadModelRequest(name="models/toy")),
            wire.models.UnloadModel(model_service_pb2.UnloadModelRequest(name="models/toy")),
        ]
        refusals = [await refused(call) for call in calls]
    assert {(told.code, told.reason) for told in refusals} == {(grpc.StatusCode.UNIMPLEMENTED, "METHOD_DISABLED")}


async def _restarted(server: LocalServer, times: int) -> Samples:
    """A scrape when the engine is ready after so many restarts."""

    def look() -> Samples | None:
        now = scrape(server)
        is_ready = now.sum("underpaint_engine_restarts_total") >= times and now.sum("underpaint_model_ready") > 0
        return now if is_ready else None

    found: Samples = await eventually(look)
    return found


async def _health(wire: Stubs) -> dict[str, bool]:
    return {name: await wire.serves(name) for name in NAMES}


async def _model(wire: Stubs) -> Any:
    return (await wire.models.ListModels(model_service_pb2.ListModelsRequest())).models[0]


async def _end(call: Any) -> Any:
    """What a stream ends with that must end badly."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await until(call, lambda event: event.WhichOneof("event") == "result")
    return refusal(caught.value)
