"""DirectionService and Operations on the wire: what is refused, what is kept, what ends how."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import numpy as np
import pytest
import pytest_asyncio
from google.longrunning import operations_pb2 as ops
from google.rpc import error_details_pb2
from safetensors.numpy import load, save
from support.front import MINI, SETTINGS, Wire, edit, encoded, merged, photo, picture, refused, started
from support.waiting import PATIENCE_S, until
from underpaint.v1 import direction_service_pb2 as d
from underpaint.v1 import edit_service_pb2, types_pb2
from underpaint_server.errors import (
    Draining,
    FieldInvalid,
    FieldViolation,
    ModelLoading,
    NonFiniteLatents,
    QueueFull,
    WorkerRestarted,
)
from underpaint_server.jobs import Descent, Generated, LearnJob, Phase, Photo, Priority, Progress, Sampler, Search
from underpaint_server.methods.disentangled.options import DisentangledEdit
from underpaint_server.plans import total_rows
from underpaint_server.rpc.requests.edit import edit_draft
from underpaint_server.stores import codec
from underpaint_server.stores import directions as files
from underpaint_server.stores.operations import OperationSummary
from underpaint_server.wire.fields import Fields

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def asked(**fields: Any) -> d.LearnDirectionRequest:
    """A good request, with fields to spoil it."""
    request = d.LearnDirectionRequest(direction=d.Direction(source_prompt="a dog", target_prompt="a happy dog"))
    if "examples" not in fields:
        request.examples.add(seed=3)
    request.MergeFrom(d.LearnDirectionRequest(**fields))
    return request


async def ended(wire: Wire, name: str) -> ops.Operation:
    request = ops.WaitOperationRequest(name=name, timeout={"seconds": int(PATIENCE_S)})
    operation = await wire.operations.WaitOperation(request)
    assert operation.done
    return operation


async def learn(wire: Wire, **fields: Any) -> d.Direction:
    operation = (await wire.directions.LearnDirection(asked(**fields))).operation
    operation, learned = await ended(wire, operation.name), d.Direction()
    assert operation.response.Unpack(learned), operation.error
    return learned


async def exported(wire: Wire, name: str) -> bytes:
    parts = [part async for part in wire.directions.ExportDirection(d.ExportDirectionRequest(name=name))]
    data = b"".join(part.chunk for part in parts)
    assert (parts[0].total_bytes, parts[-1].crc32c) == (len(data), google_crc32c.value(data))
    return data


def importing(wire: Wire, *parts: dict[str, Any]) -> Any:
    return wire.directions.ImportDirection(iter([d.ImportDirectionRequest(**part) for part in parts]))


@pytest_asyncio.fixture
async def idle() -> AsyncIterator[Wire]:
    """A server that learns nothing itself."""
    async with started(SETTINGS.model_copy(update={"max_learning": 0, "max_operations": 3})) as wire:
        yield wire


# --- what is learned -----------------------------------------------------------------------------------------------


async def test_defaults_are_filled_in(wire: Wire) -> None:
    learned = await learn(wire)
    (job, *_) = wire.engine.jobs
    assert isinstance(job, LearnJob)
    options = job.options
    assert (options.num_inference_steps, options.sampler, options.guidance_scale) == (20, Sampler.DDIM, 5.0)
    assert (options.switch_step, options.late_weight, options.content_weight) == (8, 0.0, 0.05)
    assert options.method == Descent(10, 0.05)
    assert job.examples == (Generated("a dog", 3, 64, 48, 20),)
    assert (job.iterations, job.state) == (SETTINGS.learn_checkpoint_every, None)
    assert {handle.priority for handle in wire.engine.handles} == {Priority.LEARNING}
    assert set(wire.engine.deadlines) == {None}
    assert [job.state.iteration for job in wire.engine.jobs[1:]] == [2, 4, 6, 8]
    assert (len(learned.weights), len(learned.losses), learned.method) == (20, 11, d.LEARN_METHOD_GRADIENT)
    assert (learned.model, learned.content_features, learned.example_count) == ("models/mini", "vae", 1)


async def test_everything_said_reaches_the_job(wire: Wire) -> None:
    direction = {"steps": 10, "sampler": types_pb2.SAMPLER_PLMS, "guidance_scale": 2.5, "display_name": "Joy"}
    settings = {"optimization_steps": 3, "content_weight": 0.2, "learning_rate": 0.1, "switch_step": 0, "seed": 9}
    examples = [{"image": photo(seed=1)}, {"seed": 2**64 - 1}, {"image": photo((200, 100), seed=2)}]
    learned = await learn(
        wire, direction=direction, examples=examples, late_weight=-0.5, direction_id="joy", **settings
    )
    options, found = wire.engine.jobs[0].options, wire.engine.jobs[0].examples
    assert (options.num_inference_steps, options.sampler, options.guidance_scale) == (10, Sampler.PLMS, 2.5)
    assert (options.method, options.switch_step, options.late_weight) == (Descent(3, 0.1), 0, -0.5)
    assert (options.content_weight, options.seed) == (0.2, 9)
    assert [type(example) for example in found] == [Photo, Generated, Photo]
    assert np.array_equal(found[0].pixels, np.asarray(picture(seed=1)))
    assert found[2].pixels.shape == (48, 64, 3)
    assert (learned.name, learned.display_name, learned.example_count) == ("directions/joy", "Joy", 3)
    assert list(learned.weights) == pytest.approx(wire.engine.handles[-1]._outcome.state.best_weights, abs=1e-7)


async def test_a_search_is_one_job(wire: Wire) -> None:
    candidates = {"switch_steps": [1, 2], "late_weights": [0.1]}
    await learn(wire, method=d.LEARN_METHOD_SEARCH, candidates=candidates)
    await learn(wire, method=d.LEARN_METHOD_SEARCH, direction={"steps": 10})
    assert [job.options.method for job in wire.engine.jobs] == [
        Search((1, 2), (0.1,)), Search((2, 3, 4, 5, 6), (0.2, 0.0, -0.2)),
    ]  # fmt: skip


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no prompts": ({"direction": {"source_prompt": "", "target_prompt": " "}}, ["direction.target_prompt"]),
    "equal prompts": ({"direction": {"target_prompt": "a dog"}}, ["direction.target_prompt"]),
    "a long prompt": ({"direction": {"source_prompt": "x" * 101}}, ["direction.source_prompt"]),
    "a long name": ({"direction": {"display_name": "x" * 201}}, ["direction.display_name"]),
    "many steps": ({"direction": {"steps": 51}}, ["direction.steps"]),
    "negative steps": ({"direction": {"steps": -1}}, ["direction.steps"]),
    "guidance": ({"direction": {"guidance_scale": 31}}, ["direction.guidance_scale"]),
    "guidance that is none": ({"direction": {"guidance_scale": float("nan")}}, ["direction.guidance_scale"]),
    "a sampler of tomorrow": ({"direction": {"sampler": 9}}, ["direction.sampler"]),
    "what the server sets": (
        {"direction": {"name": "directions/x", "weights": [1], "etag": "x", "losses": [1]}},
        ["direction.name", "direction.etag", "direction.weights", "direction.losses"],
    ),
    "a malformed model": ({"direction": {"model": "mini"}}, ["direction.model"]),
    "a malformed id": ({"direction_id": "Joy"}, ["direction_id"]),
    "a long id": ({"direction_id": "x" * 64}, ["direction_id"]),
    "no uuid": ({"request_id": "1"}, ["request_id"]),
    "no examples": ({"examples": []}, ["examples"]),
    "many examples": ({"examples": [{"seed": k} for k in range(17)]}, ["examples"]),
    "an empty example": ({"examples": [{"seed": 1}, {}]}, ["examples[1].source"]),
    "an unknown fit": ({"examples": [{"image": {"fit": 9}}]}, ["examples[0].image.fit"]),
    "many optimiser steps": ({"optimization_steps": 201}, ["optimization_steps"]),
    "content": ({"content_weight": -0.1}, ["content_weight"]),
    "rate 0": ({"learning_rate": 0}, ["learning_rate"]),
    "rate above 1": ({"learning_rate": 1.1}, ["learning_rate"]),
    "switch after the end": ({"switch_step": 21}, ["switch_step"]),
    "late": ({"late_weight": float("inf")}, ["late_weight"]),
    "a method of tomorrow": ({"method": 7}, ["method"]),
    "candidates without a search": ({"candidates": {"switch_steps": [1]}}, ["candidates"]),
    "a search with steps": (
        {"method": 2, "optimization_steps": 3, "learning_rate": 0.1, "switch_step": 1, "late_weight": 0},
        ["optimization_steps", "learning_rate", "switch_step", "late_weight"],
    ),
    "candidates out of range": (
        {"method": 2, "candidates": {"switch_steps": [1, 21], "late_weights": [3]}},
        ["candidates.switch_steps", "candidates.late_weights"],
    ),
    "candidates by the hundred thousand": (
        {"method": 2, "candidates": {"late_weights": [0] * 200_000}}, ["candidates"],
    ),
    "too many candidates": (
        {"method": 2, "candidates": {"switch_steps": [1] * 9, "late_weights": [0] * 8}}, ["candidates"],
    ),
    "all at once": (
        {
            "direction": {"steps": 60, "guidance_scale": -1}, "direction_id": "?", "learning_rate": 2,
            "content_weight": 101,
        },
        ["direction.steps", "direction_id", "learning_rate", "direction.guidance_scale", "content_weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_request_is_refused_with_every_field_at_fault(idle: Wire, case: str) -> None:
    fields, paths = BAD[case]
    refusal = await refused(idle.directions.LearnDirection(asked(**fields)))
    assert (refusal.code, refusal.reason) == (INVALID, "FIELD_INVALID")
    assert sorted(refusal.paths) == sorted(paths)
    assert not (await idle.operations.ListOperations(ops.ListOperationsRequest())).operations


async def test_what_is_no_picture_is_refused_before_anything_is_stored(idle: Wire) -> None:
    examples = [{"seed": 1}, {"image": {"content": b"no picture"}}]
    refusal = await refused(idle.directions.LearnDirection(asked(examples=examples)))
    assert (refusal.code, refusal.reason) == (INVALID, "IMAGE_UNDECODABLE")
    large = {"image": {"content": encoded(picture((513, 512)))}}
    assert (await refused(idle.directions.LearnDirection(asked(examples=[large])))).reason == "IMAGE_TOO_LARGE"
    assert not (await idle.operations.ListOperations(ops.ListOperationsRequest())).operations


async def test_a_model_that_cannot_learn_says_so(wire: Wire) -> None:
    unable = asked(direction={"model": "models/other"})
    refusal = await refused(wire.directions.LearnDirection(unable))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LEARNING_UNSUPPORTED")
    unable.optimization_steps = 5
    assert (await refused(wire.directions.LearnDirection(unable))).reason == "LEARNING_UNSUPPORTED"
    other = replace(wire.engine.models["other"], content_features="vae")
    wire.engine.models = {**wire.engine.models, "other": other}
    refusal = await refused(wire.directions.LearnDirection(unable))
    assert (refusal.paths, "other has no gradients" in refusal.message) == (["optimization_steps"], True)
    unable.method = d.LEARN_METHOD_GRADIENT
    assert (await refused(wire.directions.LearnDirection(unable))).paths == ["method"]
    refusal = await refused(wire.directions.LearnDirection(asked(direction={"model": "models/none"})))
    assert refusal.reason == "MODEL_NOT_FOUND"


@pytest.mark.parametrize(
    ("fields", "paths"),
    [
        ({"optimization_steps": 200}, ["examples", "direction.steps", "optimization_steps"]),
        ({"direction": {"steps": 50}, "optimization_steps": 20}, ["examples", "direction.steps", "optimization_steps"]),
        ({"examples": [{"seed": k} for k in range(16)]}, ["examples", "direction.steps", "optimization_steps"]),
        (
            {"method": d.LEARN_METHOD_SEARCH, "candidates": {"late_weights": [0.1] * 12}},
            ["examples", "direction.steps", "candidates"],
        ),
    ],
)
async def test_what_would_take_too_long_to_learn_is_refused(fields: dict[str, Any], paths: list[str]) -> None:
    async with started(SETTINGS.model_copy(update={"max_learning_rows": 1500, "max_learning": 0})) as wire:
        await wire.directions.LearnDirection(asked(optimization_steps=10))
        refusal = await refused(wire.directions.LearnDirection(asked(**fields)))
        assert (refusal.code, refusal.paths) == (INVALID, paths)
        assert "more than the limit of 1500" in refusal.message
        assert len((await wire.operations.ListOperations(ops.ListOperationsRequest())).operations) == 1


async def test_unfinished_operations_have_a_limit_together() -> None:
    limits = {"max_operations_rows": 2500, "max_learning": 0}
    async with started(SETTINGS.model_copy(update=limits)) as wire:
        first = (await wire.directions.LearnDirection(asked())).operation
        await wire.directions.LearnDirection(asked())
        refusal = await refused(wire.directions.LearnDirection(asked()))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OPERATIONS_FULL")
        assert "network rows" in refusal.message
        wire.context.manager.wake()
        await until(lambda: wire.metric("underpaint_operations_rows") == 2 * 1040)
        await wire.operations.CancelOperation(ops.CancelOperationRequest(name=first.name))
        await wire.directions.LearnDirection(asked())


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
async def test_rows_are_counted_as_they_will_be_computed(wire: Wire, steps: int) -> None:
    operation = (await wire.directions.LearnDirection(asked(optimization_steps=steps))).operation
    await ended(wire, operation.name)
    task = await wire.context.stores.operations.task(operation.name.removeprefix("operations/"))
    assert task is not None
    assert task.rows == sum(total_rows(handle.job) for handle in wire.engine.handles) > 0


async def test_an_id_is_given_once(idle: Wire) -> None:
    await idle.directions.LearnDirection(asked(direction_id="joy"))
    refusal = await refused(idle.directions.LearnDirection(asked(direction_id="joy")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "DIRECTION_EXISTS")
    assert refusal.details["ResourceInfo"].resource_name == "directions/joy"


def learning_calls(wire: Wire) -> float:
    """Calls of LearnDirection that have begun."""
    labels = {"grpc_type": "unary", "grpc_service": "underpaint.v1.DirectionService", "grpc_method": "LearnDirection"}
    return wire.metric("grpc_server_started_total", **labels)


async def test_of_calls_at_the_same_moment_one_gets_the_id(idle: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = idle.context.stores.operations.scan

    async def slow() -> dict[str, OperationSummary]:
        found = await scan()
        # A store far away: the others have come before this one writes. The pause makes that surer for those whose
        # call has begun but not got as far as the store; the outcome is the same without.
        await until(lambda: learning_calls(idle) == 3)
        await asyncio.sleep(0.05)
        return found

    monkeypatch.setattr(idle.context.stores.operations, "scan", slow)
    calls = [idle.directions.LearnDirection(asked(direction_id="joy", seed=seed)) for seed in range(3)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    refusals = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert [refusal.code() for refusal in refusals] == [grpc.StatusCode.ALREADY_EXISTS] * 2
    assert len((await idle.operations.ListOperations(ops.ListOperationsRequest(name="operations"))).operations) == 1


async def test_no_more_operations_wait_than_may(idle: Wire) -> None:
    first = (await idle.directions.LearnDirection(asked())).operation
    for _ in range(2):
        await idle.directions.LearnDirection(asked())
    refusal = await refused(idle.directions.LearnDirection(asked()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OPERATIONS_FULL")
    await idle.operations.CancelOperation(ops.CancelOperationRequest(name=first.name))
    await idle.directions.LearnDirection(asked())


async def test_a_server_about_to_stop_takes_nothing(wire: Wire) -> None:
    wire.context.draining = True
    refusal = await refused(wire.directions.LearnDirection(asked()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")


async def test_a_repeated_request_id_is_the_same_operation(wire: Wire) -> None:
    request = asked(request_id=str(uuid.uuid4()), examples=[{"image": photo()}])
    first, twin = await asyncio.gather(*(wire.directions.LearnDirection(request) for _ in range(2)))
    assert first.operation.name == twin.operation.name
    done = await ended(wire, first.operation.name)
    assert (await wire.directions.LearnDirection(request)).operation == done
    refusal = await refused(wire.directions.LearnDirection(merged(request, late_weight=0.1)))
    assert (refusal.code, refusal.reason) == (INVALID, "REQUEST_ID_REUSED")
    assert len((await wire.operations.ListOperations(ops.ListOperationsRequest())).operations) == 1
    assert wire.metric("underpaint_idempotent_replays_total", result="replayed") >= 1


# --- how it ends ----------------------------------------------------------------------------------------------------


async def test_refusals_that_pass_are_waited_for(wire: Wire) -> None:
    wire.engine.refusals = [
        QueueFull("full", retry_after_s=0.01), WorkerRestarted("gone", retry_after_s=1), ModelLoading("soon"),
    ]  # fmt: skip
    learned = await learn(wire, optimization_steps=4)
    assert len(learned.losses) == 5
    assert wire.engine.refusals == []


async def test_an_error_of_the_work_ends_it_with_the_status_a_call_would_have(wire: Wire) -> None:
    extreme = FieldViolation("learning_rate", "0.9 is extreme")
    wire.engine.refusals = [NonFiniteLatents("the loss became NaN or infinite", violations=(extreme,))]
    request = asked(request_id=str(uuid.uuid4()), direction_id="joy")
    operation = await ended(wire, (await wire.directions.LearnDirection(request)).operation.name)
    assert operation.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert operation.error.message == "the loss became NaN or infinite (learning_rate: 0.9 is extreme)"
    info, told = error_details_pb2.ErrorInfo(), error_details_pb2.RequestInfo()
    fields = error_details_pb2.BadRequest()
    assert operation.error.details[2].Unpack(fields)
    assert [violation.field for violation in fields.field_violations] == ["learning_rate"]
    assert operation.error.details[0].Unpack(info)
    assert operation.error.details[1].Unpack(told)
    assert (info.reason, info.domain, told.request_id) == ("NON_FINITE_LATENTS", "underpaint", request.request_id)
    refusal = await refused(wire.directions.GetDirection(d.GetDirectionRequest(name="directions/joy")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "DIRECTION_NOT_FOUND")


async def test_work_that_kills_engine_after_engine_is_given_up(wire: Wire) -> None:
    wire.engine.held = True
    operation = (await wire.directions.LearnDirection(asked())).operation
    for count in range(1, 4):
        await until(lambda: len(wire.engine.handles) >= count)  # noqa: B023 (awaited before the next)
        wire.engine.handles[-1].end(WorkerRestarted("gone"))
    operation = await ended(wire, operation.name)
    assert (operation.error.code, "3 times" in operation.error.message) == (13, True)
    assert len(wire.engine.handles) == 3


async def test_an_engine_that_ends_takes_nothing_back_of_what_was_said_to_be_done(wire: Wire) -> None:
    wire.engine.held = True
    name = (await wire.directions.LearnDirection(asked())).operation.name
    await wire.engine.submitted.wait()
    wire.engine.handles[0].advance(Progress(Phase.OPTIMIZING, 1, 2, 0.75), 3)
    before = await told(wire, name)
    assert 0 < before.fraction < 1
    wire.engine.handles[0].end(WorkerRestarted("gone"))
    await until(lambda: len(wire.engine.handles) >= 2)
    assert (await told(wire, name)).fraction == before.fraction


async def told(wire: Wire, name: str) -> types_pb2.Progress:
    operation, progress = await wire.operations.GetOperation(ops.GetOperationRequest(name=name)), types_pb2.Progress()
    assert operation.metadata.Unpack(progress)
    return progress


async def test_a_server_that_stops_answers_those_who_wait(wire: Wire) -> None:
    wire.engine.held = True
    name = (await wire.directions.LearnDirection(asked())).operation.name
    await wire.engine.submitted.wait()
    waiting = asyncio.ensure_future(wire.operations.WaitOperation(ops.WaitOperationRequest(name=name)))
    wire.engine.handles[0].end(Draining("this server is about to stop"))
    await wire.context.manager.close()
    assert not (await waiting).done


async def test_a_damaged_operation_spoils_no_list_and_can_be_deleted(tmp_path: Path) -> None:
    async with started(SETTINGS.model_copy(update={"store_url": tmp_path.as_uri()})) as wire:
        names = [(await wire.directions.LearnDirection(asked())).operation.name for _ in range(2)]
        for name in names:
            await ended(wire, name)
        done = tmp_path / names[0] / "done"
        done.write_bytes(done.read_bytes()[:-1])
        found = (await wire.operations.ListOperations(ops.ListOperationsRequest())).operations
        assert {each.name: each.error.code for each in found} == {
            names[0]: grpc.StatusCode.DATA_LOSS.value[0], names[1]: 0,
        }  # fmt: skip
        refusal = await refused(wire.operations.GetOperation(ops.GetOperationRequest(name=names[0])))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.DATA_LOSS, "STORE_CORRUPT")
        assert f"{names[0]} is damaged" in refusal.message
        await wire.operations.DeleteOperation(ops.DeleteOperationRequest(name=names[0]))


async def test_a_cancelled_operation_has_the_status_cancelled_and_is_out_of_the_engine(wire: Wire) -> None:
    wire.engine.held = True
    name = (await wire.directions.LearnDirection(asked(direction_id="joy"))).operation.name
    await wire.engine.submitted.wait()
    refusal = await refused(wire.operations.DeleteOperation(ops.DeleteOperationRequest(name=name)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "OPERATION_RUNNING")
    waiting = asyncio.ensure_future(ended(wire, name))
    await wire.operations.CancelOperation(ops.CancelOperationRequest(name=name))
    assert wire.engine.cancelled == wire.engine.handles
    assert (await waiting).error.code == grpc.StatusCode.CANCELLED.value[0]
    await wire.operations.DeleteOperation(ops.DeleteOperationRequest(name=name))
    for call in (
        wire.operations.GetOperation(ops.GetOperationRequest(name=name)),
        wire.operations.WaitOperation(ops.WaitOperationRequest(name=name)),
        wire.operations.CancelOperation(ops.CancelOperationRequest(name=name)),
        wire.operations.DeleteOperation(ops.DeleteOperationRequest(name=name)),
    ):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND")
    assert not (await wire.directions.ListDirections(d.ListDirectionsRequest())).directions


async def test_a_name_taken_meanwhile_is_not_overwritten(wire: Wire) -> None:
    other = await learn(wire, direction_id="first")
    file = await exported(wire, other.name)
    wire.engine.held = True
    name = (await wire.directions.LearnDirection(asked(direction_id="joy", optimization_steps=2))).operation.name
    await until(lambda: len(wire.engine.handles) >= 6)
    await importing(wire, {"header": {"name": "directions/joy"}}, {"chunk": file})
    wire.engine.finish(wire.engine.handles[-1])
    operation = await ended(wire, name)
    assert operation.error.code == grpc.StatusCode.ALREADY_EXISTS.value[0]
    there = await wire.directions.GetDirection(d.GetDirectionRequest(name="directions/joy"))
    assert there.direction.etag == other.etag


# --- what is kept ---------------------------------------------------------------------------------------------------


async def test_directions_are_listed_newest_first_page_by_page(wire: Wire) -> None:
    names = [(await learn(wire, direction_id=f"d{k}", optimization_steps=1)).name for k in range(3)]
    first = await wire.directions.ListDirections(d.ListDirectionsRequest(page_size=2))
    rest = await wire.directions.ListDirections(d.ListDirectionsRequest(page_size=2, page_token=first.next_page_token))
    assert [each.name for each in (*first.directions, *rest.directions)] == names[::-1]
    assert (bool(first.next_page_token), rest.next_page_token) == (True, "")
    for wrong in ({"page_size": 1001}, {"page_size": -1}, {"page_token": "?"}):
        refusal = await refused(wire.directions.ListDirections(d.ListDirectionsRequest(**wrong)))
        assert refusal.paths == list(wrong)


async def test_a_deletion_needs_the_etag_it_was_given(wire: Wire) -> None:
    learned = await learn(wire, direction_id="joy")
    stale = d.DeleteDirectionRequest(name=learned.name, etag="0" * 64)
    refusal = await refused(wire.directions.DeleteDirection(stale))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    await wire.directions.DeleteDirection(d.DeleteDirectionRequest(name=learned.name, etag=learned.etag))
    refusal = await refused(wire.directions.DeleteDirection(d.DeleteDirectionRequest(name=learned.name)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "DIRECTION_NOT_FOUND")
    malformed = await refused(wire.directions.DeleteDirection(d.DeleteDirectionRequest(name="joy")))
    assert malformed.paths == ["name"]


async def test_an_export_is_imported_as_it_was(wire: Wire) -> None:
    learned = await learn(wire, direction_id="joy", direction={"display_name": "Joy"})
    file = await exported(wire, learned.name)
    crc = google_crc32c.value(file)
    half = len(file) // 2
    parts: tuple[dict[str, Any], ...] = ({"header": {}}, {"chunk": file[:half]}, {"chunk": file[half:], "crc32c": crc})
    twin = (await importing(wire, *parts)).direction
    assert twin.name not in ("", learned.name)
    learned.name = twin.name
    assert twin == learned
    header = {"header": {"name": "directions/renamed", "display_name": "Mirth"}}
    renamed = (await importing(wire, header, {"chunk": file})).direction
    assert (renamed.name, renamed.display_name, renamed.weights) == ("directions/renamed", "Mirth", learned.weights)
    refusal = await refused(importing(wire, header, {"chunk": file}))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "DIRECTION_EXISTS")


def resealed(file: bytes, options: dict[str, Any] | None = None, **said: Any) -> bytes:
    """The file saying something else, with a checksum that is right."""
    entry = files.decode("x", file)
    changed = replace(entry.direction.options, **(options or {}))
    at = said.pop("create_time", entry.create_time)
    return files.encode(replace(entry.direction, options=changed, **said), at)


def metadata(file: bytes) -> dict[str, str]:
    said: dict[str, str] = json.loads(file[8 : codec.header_bytes(file)])["__metadata__"]
    return said


def record(file: bytes) -> dict[str, Any]:
    """What the file says, without its checksum."""
    said = codec.read_record(file)
    del said["sha256"]
    return said


def deepened(said: dict[str, Any], member: str) -> dict[str, Any]:
    return said | {member: said[member] | {"more": 1}}


async def test_imports_beyond_the_limit_are_refused() -> None:
    async with started(SETTINGS.model_copy(update={"max_directions": 3})) as wire:
        file = await exported(wire, (await learn(wire)).name)
        await importing(wire, {"header": {}}, {"chunk": file})
        wire.engine.held = True
        waiting = (await wire.directions.LearnDirection(asked())).operation
        for call in (importing(wire, {"header": {}}, {"chunk": file}), wire.directions.LearnDirection(asked())):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DIRECTIONS_FULL")
            assert refusal.metadata["entries"] == "2"
        assert wire.metric("underpaint_direction_store_entries") == 2
        assert wire.metric("underpaint_direction_store_bytes") > 2 * len(file)
        await wire.operations.CancelOperation(ops.CancelOperationRequest(name=waiting.name))
        await importing(wire, {"header": {}}, {"chunk": file})
    async with started(SETTINGS.model_copy(update={"max_directions_bytes": len(file) - 1})) as wire:
        refusal = await refused(importing(wire, {"header": {}}, {"chunk": file}))
        assert refusal.reason == "DIRECTIONS_FULL"


async def test_a_bad_file_is_not_stored(wire: Wire) -> None:
    learned = await learn(wire)
    file = await exported(wire, learned.name)
    weights, said = load(file)["weights"], '{"sha256": ""}'
    west, east = (timezone(timedelta(hours=hours)) for hours in (-14, 14))
    bad = {
        "nothing": b"",
        "no safetensors": b"x" * 100,
        "cut": file[:-3],
        "a changed weight": file[:-1] + bytes([file[-1] ^ 1]),
        "a changed text": file.replace(b"a happy dog", b"a happy cat"),
        "no metadata": save({"weights": weights}),
        "other metadata": save({"weights": weights}, metadata={"underpaint": said}),
        "a list for an object": save({"weights": weights}, metadata={"underpaint": "[]"}),
        "too large": save({"weights": np.zeros(300_000, np.float32)}),
        "another tensor": codec.encode(record(file), {"weights": weights, "more": weights}),
        "another member": codec.encode(record(file) | {"more": 1}, {"weights": weights}),
        "another option": codec.encode(deepened(record(file), "options"), {"weights": weights}),
        "other metadata besides": save({"weights": weights}, metadata=metadata(file) | {"more": "x"}),
        "a long negative prompt": resealed(file, {"negative_prompt": "x" * 101}),
        "a long prompt": resealed(file, {"source_prompt": "x" * 101}),
        "much guidance": resealed(file, {"guidance_scale": 31.0}),
        "backward guidance": resealed(file, {"guidance_scale": -1.0}),
        "a long name": resealed(file, display_name="x" * 1001),
        "a long model": resealed(file, model="x" * 1001),
        "many losses": resealed(file, losses=(0.5,) * 1001),
        "more examples than a field holds": resealed(file, example_count=2**40),
        "fewer than none": resealed(file, example_count=-1),
        "a time before all": resealed(file, create_time=datetime(1, 1, 1, tzinfo=east)),
        "a time after all": resealed(file, create_time=datetime(9999, 12, 31, 23, tzinfo=west)),
    }
    for case, data in bad.items():
        refusal = await refused(importing(wire, {"header": {"name": "directions/x"}}, {"chunk": data}))
        assert (refusal.code, refusal.paths, case) == (INVALID, ["chunk"], case)
    found = await wire.directions.ListDirections(d.ListDirectionsRequest())
    assert [each.name for each in found.directions] == [learned.name]


HEADERS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "none at all": ([], ["header"]),
    "a chunk first": ([{"chunk": b"x"}], ["header"]),
    "two headers": ([{"header": {}}, {"header": {}}], ["header"]),
    "what the file says": ([{"header": {"model": "models/mini", "steps": 3}}], ["header.model", "header.steps"]),
    "a long name": ([{"header": {"display_name": "x" * 201}}], ["header.display_name"]),
    "a malformed name": ([{"header": {"name": "Joy"}}], ["header.name"]),
    "another checksum": ([{"header": {}}, {"chunk": b"x", "crc32c": 1}], ["crc32c"]),
}


@pytest.mark.parametrize("case", HEADERS)
async def test_an_import_that_is_put_together_wrong_is_refused(wire: Wire, case: str) -> None:
    parts, paths = HEADERS[case]
    assert (await refused(importing(wire, *parts))).paths == paths


# --- edits ----------------------------------------------------------------------------------------------------------


def mixed(**fields: Any) -> edit_service_pb2.EditRequest:
    return edit("disentangled", **fields)


async def test_an_edit_takes_what_it_does_not_say_from_the_direction(wire: Wire) -> None:
    direction = {"steps": 10, "guidance_scale": 2.5, "sampler": types_pb2.SAMPLER_PLMS}
    learned = await learn(wire, direction=direction)
    request = mixed(disentangled={"direction": learned.name, "scale": 2})
    request.target_prompt = ""
    answer = await wire.edits.Edit(request)
    job = wire.engine.jobs[-1]
    assert (job.target_prompt, job.guidance_scale, job.inversion) == ("a happy dog", 2.5, None)
    method = job.method
    assert isinstance(method, DisentangledEdit)
    assert (method.source_prompt, method.sampler) == ("a dog", Sampler.PLMS)
    assert method.weights == pytest.approx([1 - 2 * (1 - weight) for weight in learned.weights], abs=1e-6)
    await wire.directions.DeleteDirection(d.DeleteDirectionRequest(name=learned.name))
    assert (await wire.edits.Edit(answer.resolved)).image == answer.image
    assert wire.engine.jobs[-1].method == method
    drawn = mixed(generated={"seed": 1}, disentangled={"direction": (await learn(wire, direction=direction)).name})
    await wire.edits.Edit(drawn)
    assert wire.engine.jobs[-1].source == Generated("a dog", 1, 64, 48, 10)


async def test_a_stored_inversion_says_what_it_shows(wire: Wire) -> None:
    made = await wire.edits.Edit(edit("edict", inversion_parameters={"source_prompt": "a dog"}))
    answer = await wire.edits.Edit(mixed(inversion=made.inversion, disentangled={"switch_step": 3}))
    assert wire.engine.jobs[-1].method.source_prompt == "a dog"
    assert (answer.resolved.inversion, answer.inversion) == (made.inversion, made.inversion)
    await wire.edits.Edit(mixed(inversion=made.inversion, disentangled={"switch_step": 3, "source_prompt": "a cat"}))
    assert wire.engine.jobs[-1].method.source_prompt == "a cat"


GENERATED = {"generated": {"prompt": "a dog", "steps": 5}}
BAD_EDITS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no weights": ({"disentangled": {}}, ["disentangled.weights"]),
    "switch after the end": ({"disentangled": {"switch_step": 21}}, ["disentangled.switch_step"]),
    "switch before the start": ({"disentangled": {"switch_step": -1}}, ["disentangled.switch_step"]),
    "many steps": ({"disentangled": {"switch_step": 1, "steps": 51}}, ["disentangled.steps"]),
    "another number of weights": (
        {"disentangled": {"given": {"values": [1, 0]}, "steps": 3}}, ["disentangled.given.values"],
    ),
    "a weight that is none": ({"disentangled": {"given": {"values": [float("nan")]}}}, ["disentangled.given.values"]),
    "a weight too large": ({"disentangled": {"given": {"values": [1001]}}}, ["disentangled.given.values"]),
    "too many weights": ({"disentangled": {"given": {"values": [1] * 51}}}, ["disentangled.given.values"]),
    "weights scaled too far": (
        {"disentangled": {"given": {"values": [-999]}, "scale": 1.1}}, ["disentangled.scale"],
    ),
    "scale": ({"disentangled": {"switch_step": 1, "scale": 4.1}}, ["disentangled.scale"]),
    "a sampler of tomorrow": ({"disentangled": {"switch_step": 1, "sampler": 3}}, ["disentangled.sampler"]),
    "a long prompt": (
        {"disentangled": {"switch_step": 1, "source_prompt": "x" * 101}}, ["disentangled.source_prompt"],
    ),
    "what the generated source says": (
        {**GENERATED, "disentangled": {"switch_step": 1, "source_prompt": "x", "steps": 5}},
        ["disentangled.source_prompt", "disentangled.steps"],
    ),
    "something to invert": (
        {"disentangled": {"switch_step": 1}, "inversion_parameters": {"steps": 3}}, ["inversion_parameters"],
    ),
    "a malformed direction": ({"disentangled": {"direction": "joy"}}, ["disentangled.direction"]),
    "no target": ({"disentangled": {"switch_step": 1}, "target_prompt": " "}, ["target_prompt"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_EDITS)
async def test_a_bad_mixed_edit_is_refused_with_every_field_at_fault(wire: Wire, case: str) -> None:
    fields, paths = BAD_EDITS[case]
    refusal = await refused(wire.edits.Edit(mixed(**fields)))
    assert (refusal.code, refusal.paths) == (INVALID, paths)
    assert wire.engine.jobs == []


async def test_a_direction_that_does_not_fit_is_refused(wire: Wire) -> None:
    learned = await learn(wire, direction_id="joy", direction={"steps": 10})
    jobs = len(wire.engine.jobs)
    for fields, reason in (
        ({"model": "models/other", "disentangled": {"direction": learned.name}}, "DIRECTION_MODEL_MISMATCH"),
        ({"disentangled": {"direction": learned.name, "steps": 11}}, "DIRECTION_STEPS_MISMATCH"),
        ({**GENERATED, "disentangled": {"direction": learned.name}}, "DIRECTION_STEPS_MISMATCH"),
    ):
        refusal = await refused(wire.edits.Edit(mixed(**fields)))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, reason)
        assert refusal.details["PreconditionFailure"].violations[0].subject == learned.name
    refusal = await refused(wire.edits.Edit(mixed(disentangled={"direction": "directions/none"})))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "DIRECTION_NOT_FOUND")
    mask = edit_service_pb2.ComputeMaskRequest(edit=mixed(disentangled={"direction": learned.name}))
    assert (await refused(wire.edits.ComputeMask(mask))).paths == ["edit.method"]
    assert len(wire.engine.jobs) == jobs


def test_a_wrong_number_of_steps_is_never_as_many_weights() -> None:
    fields = Fields()
    assert fields.count("steps", 2**31 - 1, 20, 50) == fields.count("steps", -1, 20, 50) == 20
    with pytest.raises(FieldInvalid, match=r"2147483647 is outside 1\.\.50"):
        fields.check()


def test_weights_of_the_wire_are_the_weights_of_the_next_request() -> None:
    values = [1, 0, 0.1, 1 / 3, -0.123456789, 99.99994, 8.589973e-9, 1.1754944e-38]
    first = edit_draft(mixed(disentangled={"given": {"values": values}, "scale": -1.37}), MINI, SETTINGS).method
    assert isinstance(first, DisentangledEdit)
    again = edit_draft(mixed(disentangled={"given": {"values": first.weights}}), MINI, SETTINGS).method
    assert isinstance(again, DisentangledEdit)
    assert again.weights == first.weights
