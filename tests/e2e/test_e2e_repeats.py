"""Reading twice: the work is done once, the bytes are the same, on one server and on another."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from e2e.harness import Samples, disc, eventually, idle, masking, running, scrape, stubs, together
from safetensors.numpy import load
from support.front import edit, merged, photo, refused
from underpaint import (
    AsyncClient,
    Client,
    Convention,
    Ddim,
    DdimInversion,
    DiffEdit,
    Edict,
    EdictInversion,
    Generated,
    Resolved,
    SdEdit,
)
from underpaint.v1 import edit_service_pb2, inversion_service_pb2, types_pb2
from underpaint_server.local_server import LocalServer

ROWS = "underpaint_network_rows_total"
METHODS: dict[str, Edict | Ddim | SdEdit | DiffEdit] = {
    "edict": Edict(steps=10),
    "ddim": Ddim(steps=10),
    "sdedit": SdEdit(steps=10, strength=0.6),
    "diffedit": DiffEdit(steps=10, samples=4),
}


async def test_two_calls_with_one_request_id_are_one_piece_of_work(narrow: LocalServer) -> None:
    before = await idle(narrow)
    request = edit("edict", image=photo(seed=50), request_id=str(uuid4()))
    async with stubs(narrow) as wire:
        async with running(wire, masking()):  # both wait behind it, so they are there together
            calls = [asyncio.ensure_future(wire.edits.Edit(request)) for _ in range(2)]
            await _waits(narrow, "underpaint_idempotent_replays_total", before, result="joined")
        one, other = await asyncio.gather(*calls)
        later = await wire.edits.Edit(request)
    assert one == other == later
    after = await idle(narrow)
    assert after.sum(ROWS, method="edict") == before.sum(ROWS, method="edict") + one.usage.network_evaluations
    replays = "underpaint_idempotent_replays_total"
    assert after.sum(replays, result="joined") == before.sum(replays, result="joined") + 1
    assert after.sum(replays, result="replayed") == before.sum(replays, result="replayed") + 1


async def test_one_of_two_callers_may_leave_and_the_other_is_served(narrow: LocalServer) -> None:
    before = await idle(narrow)
    request = edit("sdedit", seed=51, request_id=str(uuid4()))
    async with stubs(narrow) as wire:
        async with running(wire, masking()):
            first = wire.edits.Edit(request)
            second = asyncio.ensure_future(wire.edits.Edit(request))
            await _waits(narrow, "underpaint_idempotent_replays_total", before, result="joined")
            first.cancel()
        assert (await second).image.content
    after = await idle(narrow)
    cancelled = {"method": "sdedit"}
    total = "underpaint_cancellations_total"
    assert after.sum(total, **cancelled) == before.sum(total, **cancelled)


async def test_many_inversions_of_one_photo_are_one_piece_of_work(narrow: LocalServer) -> None:
    before = await idle(narrow)
    request = merged(inversion_service_pb2.InvertRequest(), image=photo(seed=52), parameters={"edict": {}, "steps": 10})
    async with stubs(narrow) as wire:
        async with running(wire, masking()):
            calls = [asyncio.ensure_future(wire.inversions.Invert(request)) for _ in range(4)]
            await _waits(narrow, "underpaint_inversion_store_requests_total", before, more=3, result="joined")
        answers = await asyncio.gather(*calls)
        again = await wire.inversions.Invert(request)
    assert len({answer.inversion.name for answer in answers}) == 1
    assert again.inversion.name == answers[0].inversion.name
    assert again.usage.inversion_cache_hit
    assert again.usage.network_evaluations == 0
    after = await idle(narrow)
    rows = answers[0].usage.network_evaluations
    assert after.sum(ROWS, method="invert_edict") == before.sum(ROWS, method="invert_edict") + rows


@pytest.mark.parametrize(
    ("name", "shared", "own"), [("edict", 4 * 16, 4 * 16), ("ddim", 16, 2 * 16), ("diffedit", 16 + 10, 10 + 2 * 16)]
)
@pytest.mark.parametrize("model", ["toy", "other"])
async def test_prompts_on_one_photo_share_their_inversion_though_they_come_together(
    toy: LocalServer, separate: LocalServer, name: str, shared: int, own: int, model: str
) -> None:
    """The first of them would have stored it for those that come later; and for masks the seeds are equal too."""
    described: dict[str, Any] = {"source_prompt": "a cat", "steps": 20, "strength": 0.8}
    image, more = photo(seed=80 + len(name)), {"diffedit": {"samples": 10}} if name == "diffedit" else {}
    requests = [
        edit(
            name, image=image, model=f"models/{model}", inversion_parameters=described, target_prompt=prompt, seed=1,
            **more,
        )
        for prompt in ("a dog", "a corgi", "a fox", "a red circle")
    ]  # fmt: skip
    before = await idle(toy)
    async with stubs(toy) as wire, stubs(separate) as other:
        answers = await together(toy, [wire.edits.Edit(request) for request in requests], inside=4)
        after = await idle(toy)
        alone = await together(separate, [other.edits.Edit(request) for request in requests], inside=4)
        stored = await wire.edits.Edit(requests[0])
    assert [answer.image for answer in answers] == [answer.image for answer in alone]
    assert [answer.mask for answer in answers] == [answer.mask for answer in alone]
    assert len({answer.inversion for answer in (*answers, *alone)}) == 1
    assert stored.image == answers[0].image
    assert stored.usage.inversion_cache_hit
    assert {answer.usage.network_evaluations for answer in (*answers, *alone)} == {shared + own}
    assert sum(answer.usage.reused_evaluations for answer in answers) == 3 * shared
    assert not any(answer.usage.reused_evaluations for answer in alone)
    labels = {"model": model, "method": name}
    assert after.sum(ROWS, **labels) - before.sum(ROWS, **labels) == shared + 4 * own
    reused = [page.sum("underpaint_reused_rows_total", model=model, kind="denoise") for page in (before, after)]
    assert reused[1] - reused[0] == 3 * shared


@pytest.fixture(scope="module")
def separate() -> Iterator[LocalServer]:
    """The closed-form network on a server that computes every row."""
    with LocalServer(models="toy=toy:,other=toy:pinned", reuse_bytes=0) as server:
        yield server


@pytest.mark.parametrize("place", ["toy:", "toy:pinned"])
async def test_resolved_gives_the_same_bytes_here_and_on_another_server(place: str, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"models": f"toy={place}", "store_url": tmp_path.as_uri()}
    with LocalServer(**shared) as one, LocalServer(**shared, max_batch_size=5) as other:
        with Client(one.target) as here, Client(other.target) as there:
            for source in (disc(), disc(size=(150, 40)), Generated("a cat", seed=3, steps=10)):
                for name, method in METHODS.items():
                    plain = isinstance(source, Generated) and name != "sdedit"
                    chosen = type(method)() if plain else method
                    made = here.edit(source, "a corgi", chosen)
                    told = Resolved.from_json(made.resolved.to_json())
                    for client in (here, there):
                        assert client.repeat(told).image_bytes == made.image_bytes, (name, source)
            mask = here.compute_mask(disc(), "a corgi", DiffEdit(samples=4))
        await _repeat_by_id(one, other)
        await _repeat_mask(other, mask.resolved.message, mask.mask_bytes)
        await _repeat_mask(one, mask.resolved.message, mask.mask_bytes)


async def test_an_edit_is_repeated_from_its_photo_when_its_inversion_is_gone(toy: LocalServer) -> None:
    """Deleted here; a restart with the store in memory comes to the same. An injection's content is a photo too."""
    source, content = photo((150, 40), seed=70), photo(seed=71)
    source.fit = types_pb2.FIT_RESIZE
    content.fit = types_pb2.FIT_PAD
    given = {"steps": 9, "strength": 0.9, "guidance_scale": 2.0, "source_prompt": "a cat"}
    async with stubs(toy) as wire, AsyncClient(toy.target) as client:
        for name in ("edict", "ddim", "diffedit", "content_injection"):
            more: dict[str, Any] = {"content_injection": {"image": content}} if name == "content_injection" else {}
            first = await wire.edits.Edit(edit(name, image=source, inversion_parameters=given, seed=1, **more))
            async for stored in client.list_inversions():
                await client.delete_inversion(stored)
            refusal = await refused(wire.edits.Edit(first.resolved))
            assert refusal.reason == "INVERSION_EXPIRED"
            request = edit_service_pb2.EditRequest()
            request.CopyFrom(first.resolved)
            request.image.CopyFrom(source)
            if more:
                request.content_injection.image.CopyFrom(content)
            again = await wire.edits.Edit(request)
            assert (again.image, again.resolved) == (first.image, first.resolved), name


async def test_an_edit_of_a_stored_inversion_is_repeated_from_the_photo_too(toy: LocalServer) -> None:
    """Methods that invert nothing start from the encoded photo, which is the same."""
    source, content = photo((150, 40), seed=72), photo(seed=73)
    requests = {
        "sdedit": edit("sdedit", seed=1),
        "disentangled": edit(
            "disentangled", seed=1, disentangled={"switch_step": 4, "sampler": types_pb2.SAMPLER_PLMS}
        ),
        "content_injection": edit("content_injection", seed=1, content_injection={"image": content}),
        "ddim": edit("ddim", seed=1),
    }
    async with stubs(toy) as wire:
        for name, request in requests.items():
            made = await wire.edits.Edit(edit("ddim", image=source, inversion_parameters={"source_prompt": "a cat"}))
            request.inversion = made.inversion
            first = await wire.edits.Edit(request)
            await wire.inversions.DeleteInversion(inversion_service_pb2.DeleteInversionRequest(name=made.inversion))
            resolved = edit_service_pb2.EditRequest()
            resolved.CopyFrom(first.resolved)
            resolved.image.CopyFrom(source)
            assert (await wire.edits.Edit(resolved)).image == first.image, name


def test_a_stored_inversion_says_again_what_its_caller_may_not_expect(toy: LocalServer) -> None:
    with Client(toy.target) as client:
        method = EdictInversion(mixing_coefficient=0.6)
        made = [client.invert(disc((7, 70, 7)), method=method, steps=50, source_prompt="((a cat))") for _ in range(2)]
    assert made[1].usage is not None
    assert made[1].usage.inversion_cache_hit
    assert {notice.reason for notice in made[0].notices} == {"PROMPT_SYNTAX", "INVERSION_INEXACT"}
    assert made[1].notices == made[0].notices


def test_the_client_repeats_an_edit_whose_inversion_is_gone(toy: LocalServer) -> None:
    with Client(toy.target) as client:
        for method in (Edict(steps=9), Ddim(steps=9), DiffEdit(steps=9, samples=4)):
            made = client.edit(disc((9, 9, 200)), "a corgi", method, source_prompt="a cat", guidance_scale=2)
            assert made.inversion is not None
            client.delete_inversion(made.inversion)
            assert client.repeat(made.resolved).image_bytes == made.image_bytes


@pytest.mark.parametrize("place", ["toy:", "toy:pinned"])
async def test_an_edit_has_the_same_bytes_alone_and_in_a_crowd(place: str) -> None:
    requests = [edit(name, image=photo(seed=60 + n), seed=1) for n, name in enumerate(METHODS)]
    with LocalServer(models=f"toy={place}", reuse_bytes=0) as server:  # so that the crowd computes it again
        async with stubs(server) as wire:
            answers = [await wire.edits.Edit(request) for request in requests]
            alone = answers[0]
            latents = await _latents(server, alone.inversion)
            for name in filter(None, (answer.inversion for answer in answers)):
                await wire.inversions.DeleteInversion(inversion_service_pb2.DeleteInversionRequest(name=name))
            crowd = [wire.edits.Edit(edit(name, image=photo(seed=n))) for n in range(12) for name in METHODS]
            same = [wire.edits.Edit(request) for request in requests]
            all_answers = await together(server, (*same, *crowd), inside=24)
            crowded = all_answers[0]
            again = await _latents(server, crowded.inversion)
    assert [answer.image for answer in all_answers[: len(answers)]] == [answer.image for answer in answers]
    assert latents.keys() == again.keys() == {"source", "x", "y"}
    assert all(np.array_equal(latents[name], again[name]) for name in latents)
    assert not crowded.usage.inversion_cache_hit
    assert crowded.usage.mean_batch_size > 1 >= alone.usage.mean_batch_size


def test_whatever_changes_an_inversion_changes_its_name(toy: LocalServer) -> None:
    plain: dict[str, Any] = {"image": disc(), "steps": 10, "strength": 0.8, "guidance_scale": 3.0, "source_prompt": "a"}
    others: list[dict[str, Any]] = [
        {"image": disc((0, 0, 0))}, {"steps": 11}, {"strength": 0.7}, {"guidance_scale": 2.0}, {"source_prompt": "b"},
        {"model": "other"}, {"fit": "pad", "image": disc(size=(64, 48))}, {"image": disc(size=(64, 48))},
        {"method": EdictInversion(mixing_coefficient=0.9)}, {"method": DdimInversion()},
        {"method": DdimInversion(convention=Convention.CURRENT)},
    ]  # fmt: skip
    with Client(toy.target) as client:
        names = [client.invert(**plain | other).name for other in [{}, *others]]
        assert len(set(names)) == len(names)
        assert [client.invert(**plain | other).name for other in [{}, *others]] == names
        assert {one.name for one in client.list_inversions(page_size=5)} >= set(names)


def test_without_a_seed_one_is_drawn_and_told(toy: LocalServer) -> None:
    with Client(toy.target) as client:
        made = [client.edit(disc(), "a corgi", SdEdit()) for _ in range(2)]
        assert made[0].resolved.seed != made[1].resolved.seed
        assert made[0].image_bytes != made[1].image_bytes
        same = client.edit(disc(), "a corgi", SdEdit(), seed=made[0].resolved.seed)
    assert same.image_bytes == made[0].image_bytes


def test_the_seed_of_a_drawn_picture_draws_it_again(toy: LocalServer) -> None:
    with Client(toy.target) as client:
        made = [client.generate("a corgi", steps=5) for _ in range(2)]
        assert made[0].resolved.seed != made[1].resolved.seed
        assert client.generate("a corgi", steps=5, seed=made[0].resolved.seed).image_bytes == made[0].image_bytes
        edited = client.edit(Generated("a corgi", seed=1, steps=5), "a cat", SdEdit(steps=5), seed=2)
        assert edited.resolved.seed == 2


async def _repeat_by_id(one: LocalServer, other: LocalServer) -> None:
    """Servers of one store have one answer for a request id, and refuse another request under it."""
    request = edit("sdedit", request_id=str(uuid4()))  # without a seed, so computed anew it would be another image
    before = await idle(other)
    async with stubs(one) as here, stubs(other) as there:
        first = await here.edits.Edit(request)
        assert await there.edits.Edit(request) == first
        changed = edit("sdedit", request_id=request.request_id, target_prompt="another")
        assert (await refused(there.edits.Edit(changed))).reason == "REQUEST_ID_REUSED"
    after = await idle(other)
    assert after.sum(ROWS) == before.sum(ROWS)
    assert after.sum("underpaint_idempotent_replays_total", result="stored") == 1


async def _repeat_mask(server: LocalServer, resolved: edit_service_pb2.EditRequest, mask: bytes) -> None:
    async with stubs(server) as wire:
        again = await wire.edits.ComputeMask(edit_service_pb2.ComputeMaskRequest(edit=resolved))
    assert again.mask.content == mask
    assert again.resolved == resolved


async def _latents(server: LocalServer, inversion: str) -> dict[str, Any]:
    async with AsyncClient(server.target) as client:
        return load(await client.export_inversion(inversion))


async def _waits(server: LocalServer, name: str, before: Samples, more: int = 1, **labels: str) -> None:
    """Until that counter has risen by so much."""
    await eventually(lambda: scrape(server).sum(name, **labels) >= before.sum(name, **labels) + more)
