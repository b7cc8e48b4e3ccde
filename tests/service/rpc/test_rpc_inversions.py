"""Inversions over a socket: made once, named by their content, listed, exported, deleted."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import numpy as np
import pytest
from safetensors.numpy import load
from support.front import MINI, SETTINGS, Wire, answer, edit, photo, refused, started
from support.waiting import until
from underpaint.v1 import inversion_service_pb2 as pb
from underpaint.v1 import types_pb2
from underpaint_server.errors import WorkerRestarted
from underpaint_server.jobs import Phase, Progress

NAME = "inversions/" + "a" * 64


def invert(seed: int = 0, **fields: Any) -> pb.InvertRequest:
    request = pb.InvertRequest(image=photo(seed=seed))
    if "parameters" not in fields:
        request.parameters.edict.SetInParent()
    request.MergeFrom(pb.InvertRequest(**fields))
    return request


async def test_an_inversion_has_every_default_filled_in(wire: Wire) -> None:
    answer = await wire.inversions.Invert(invert(image=photo((200, 100))))
    made = answer.inversion
    assert made.model == "models/mini"
    assert made.parameters == pb.InversionParameters(
        steps=20, strength=0.8, guidance_scale=3, edict=pb.EdictInversion(mixing_coefficient=0.93)
    )
    assert (made.width, made.height) == (64, 48)
    assert made.fitting.source_width == 200
    assert made.size_bytes > 0
    assert not made.HasField("reconstruction_psnr_db")
    assert made.expire_time.ToSeconds() - made.create_time.ToSeconds() == 24 * 3600
    assert (answer.usage.inversion_cache_hit, answer.usage.network_evaluations) == (False, 40)


async def test_the_same_image_is_inverted_once(wire: Wire) -> None:
    first = await wire.inversions.Invert(invert())
    second = await wire.inversions.Invert(invert())
    assert first.inversion.name == second.inversion.name
    assert second.usage.inversion_cache_hit
    assert second.usage.network_evaluations == 0
    await wire.inversions.Invert(invert(parameters={"edict": {}, "steps": 30}))
    await wire.inversions.Invert(invert(seed=1))
    assert len(wire.engine.jobs) == 3


async def test_two_calls_at_once_share_one_job(wire: Wire) -> None:
    wire.engine.held = True
    calls = [wire.inversions.Invert(invert()) for _ in range(2)]
    await until(lambda: wire.metric("underpaint_inversion_store_requests_total", result="joined"))
    calls[0].cancel()
    wire.engine.finish(wire.engine.handles[0])
    answer = await calls[1]
    assert len(wire.engine.jobs) == 1
    assert wire.engine.cancelled == []
    assert answer.inversion.name


async def test_an_inversion_is_the_start_of_an_edit_of_its_image(wire: Wire) -> None:
    made = await wire.inversions.Invert(invert())
    answer = await wire.edits.Edit(edit("edict"))
    assert answer.inversion == made.inversion.name
    assert answer.usage.inversion_cache_hit


async def test_verifying_later_runs_only_the_round_trip_and_is_recorded(wire: Wire) -> None:
    plain = await wire.inversions.Invert(invert())
    verified = await wire.inversions.Invert(invert(verify=True))
    assert verified.inversion.name == plain.inversion.name
    assert verified.inversion.reconstruction_psnr_db == 40.0
    assert verified.inversion.reconstruction_max_abs_error == 1e-13
    assert wire.engine.jobs[1].inversion is not None
    again = await wire.inversions.Invert(invert(verify=True))
    assert len(wire.engine.jobs) == 2
    assert again.inversion.reconstruction_psnr_db == 40.0
    got = await wire.inversions.GetInversion(pb.GetInversionRequest(name=plain.inversion.name))
    assert got.inversion.reconstruction_psnr_db == 40.0


async def test_a_perfect_round_trip_has_infinite_psnr(wire: Wire) -> None:
    wire.engine.held = True
    call = wire.inversions.Invert(invert(verify=True))
    await wire.engine.submitted.wait()
    handle = wire.engine.handles[0]
    result: Any = answer(handle.job, MINI)
    inversion = replace(result.inversion, reconstruction_psnr_db=float("inf"), reconstruction_max_abs_error=0.0)
    handle.end(replace(result, inversion=inversion))
    assert (await call).inversion.reconstruction_psnr_db == float("inf")


async def test_a_stream_is_progress_then_the_result(wire: Wire) -> None:
    wire.engine.held = True
    call = wire.inversions.StreamInvert(pb.StreamInvertRequest(invert=invert()))
    await wire.engine.submitted.wait()
    assert (await call.read()).progress.phase == types_pb2.PHASE_QUEUED
    wire.engine.handles[0].advance(Progress(Phase.INVERTING, 1, 16, 0.1), 4)
    assert (await call.read()).progress.fraction == pytest.approx(0.1)
    wire.engine.finish(wire.engine.handles[0])
    assert (await call.read()).result.inversion.name
    assert await call.read() is grpc.aio.EOF


async def test_a_stream_of_what_is_there_is_the_result_alone(wire: Wire) -> None:
    await wire.inversions.Invert(invert())
    events = [event async for event in wire.inversions.StreamInvert(pb.StreamInvertRequest(invert=invert()))]
    assert [event.WhichOneof("event") for event in events] == ["result"]


async def test_a_joined_job_that_fails_fails_for_all(wire: Wire) -> None:
    wire.engine.held = True
    calls = [wire.inversions.Invert(invert()) for _ in range(2)]
    await until(lambda: wire.metric("underpaint_inversion_store_requests_total", result="joined"))
    wire.engine.handles[0].end(WorkerRestarted("gone", retry_after_s=1.0))
    assert [(await refused(call)).reason for call in calls] == ["WORKER_RESTARTED"] * 2
    wire.engine.held = False
    await wire.inversions.Invert(invert())
    assert len(wire.engine.jobs) == 2


async def test_inversions_are_listed_newest_first_in_pages(wire: Wire) -> None:
    made = [(await wire.inversions.Invert(invert(seed=seed))).inversion.name for seed in range(5)]
    names: list[str] = []
    token = ""
    for expected in (2, 2, 1):
        page = await wire.inversions.ListInversions(pb.ListInversionsRequest(page_size=2, page_token=token))
        assert len(page.inversions) == expected
        names += [inversion.name for inversion in page.inversions]
        token = page.next_page_token
    assert token == ""
    assert names == made[::-1]


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        (pb.ListInversionsRequest(page_size=1001), "page_size"),
        (pb.ListInversionsRequest(page_size=-1), "page_size"),
        (pb.ListInversionsRequest(page_token="mine"), "page_token"),
    ],
)
async def test_bad_pages_are_refused(wire: Wire, request_: pb.ListInversionsRequest, path: str) -> None:
    refusal = await refused(wire.inversions.ListInversions(request_))
    assert (refusal.reason, refusal.paths) == ("FIELD_INVALID", [path])


async def test_the_export_is_the_file_with_its_sum(wire: Wire) -> None:
    wire.engine.held = True
    call = wire.inversions.Invert(invert(parameters={"ddim": {}}))
    await wire.engine.submitted.wait()
    result: Any = answer(wire.engine.jobs[0], MINI)
    arrays = {"trajectory": np.random.default_rng(0).standard_normal((30, 4, 48, 64))}
    wire.engine.handles[0].end(replace(result, inversion=replace(result.inversion, arrays=arrays)))
    name = (await call).inversion.name
    messages = [m async for m in wire.inversions.ExportInversion(pb.ExportInversionRequest(name=name))]
    data = b"".join(message.chunk for message in messages)
    assert len(messages) == 3
    assert max(len(message.chunk) for message in messages) <= 2**20
    assert [message.total_bytes for message in messages] == [len(data), 0, 0]
    assert [message.crc32c for message in messages] == [0, 0, google_crc32c.value(data)]
    np.testing.assert_array_equal(load(data)["trajectory"], arrays["trajectory"])


async def test_deleting(wire: Wire) -> None:
    name = (await wire.inversions.Invert(invert())).inversion.name
    await wire.inversions.DeleteInversion(pb.DeleteInversionRequest(name=name))
    refusal = await refused(wire.inversions.DeleteInversion(pb.DeleteInversionRequest(name=name)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "INVERSION_EXPIRED")
    assert refusal.details["ResourceInfo"].resource_name == name
    await wire.inversions.DeleteInversion(pb.DeleteInversionRequest(name=name, allow_missing=True))
    assert (await refused(wire.edits.Edit(edit("edict", inversion=name)))).reason == "INVERSION_EXPIRED"


@pytest.mark.parametrize("rpc", ["GetInversion", "DeleteInversion", "ExportInversion"])
@pytest.mark.parametrize(
    ("name", "reason"), [(NAME, "INVERSION_EXPIRED"), ("a" * 64, "FIELD_INVALID"), ("", "FIELD_INVALID")]
)
async def test_names_that_mean_nothing(wire: Wire, rpc: str, name: str, reason: str) -> None:
    refusal = await refused(getattr(wire.inversions, rpc)(getattr(pb, f"{rpc}Request")(name=name)))
    assert refusal.reason == reason
    if reason == "FIELD_INVALID":
        assert refusal.paths == ["name"]


# --- a store out of reach -----------------------------------------------------------------------------------------


@asynccontextmanager
async def without_store(folder: Path) -> AsyncIterator[tuple[Wire, str]]:
    """A server whose store went away after it had taken one inversion, and the name of that."""
    async with started(SETTINGS.model_copy(update={"store_url": f"file://{folder}"})) as wire:
        made = await wire.inversions.Invert(invert())
        (folder / "inversions").rename(folder / "away")
        (folder / "inversions").touch()
        yield wire, made.inversion.name


async def test_calls_that_need_the_store_are_told_to_come_back(tmp_path: Path) -> None:
    async with without_store(tmp_path) as (wire, name):
        for call in [
            wire.inversions.Invert(invert()),
            wire.inversions.Invert(invert(seed=1)),
            wire.inversions.StreamInvert(pb.StreamInvertRequest(invert=invert())),
            wire.inversions.GetInversion(pb.GetInversionRequest(name=name)),
            wire.inversions.DeleteInversion(pb.DeleteInversionRequest(name=name)),
            wire.inversions.ExportInversion(pb.ExportInversionRequest(name=name)),
            wire.edits.Edit(edit("edict", inversion=name)),
        ]:
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
            assert refusal.details["RetryInfo"].retry_delay.ToMilliseconds() > 0
            assert str(tmp_path) not in repr(refusal)
        assert len(wire.engine.jobs) == 1, "nothing is computed that could not be kept"


async def test_an_edit_of_an_image_needs_no_store(tmp_path: Path) -> None:
    async with without_store(tmp_path) as (wire, _):
        answer = await wire.edits.Edit(edit("edict"))
        assert answer.image.content
        assert answer.inversion == ""
        assert answer.resolved.WhichOneof("source") == "image"
