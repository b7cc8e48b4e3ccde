"""Answers under request ids that several servers share: in the store, and between real servers of one store."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import obstore
import pytest
import pytest_asyncio
from obstore.store import ObjectStore
from support.front import SETTINGS, Wire, edit, photo, refused, started
from support.waiting import until
from underpaint.v1 import edit_service_pb2, inversion_service_pb2
from underpaint_server.errors import StoreUnavailable
from underpaint_server.stores import replays as module
from underpaint_server.stores.blobs import Blobs
from underpaint_server.stores.replays import Replay, ReplayStore
from underpaint_server.stores.urls import open_store

PRINT = b"p" * 32
REPLAYS = "underpaint_idempotent_replays_total"


class Clock:
    """Unix time, some seconds away from the machine's."""

    ahead_s = 0.0

    def __call__(self) -> float:
        import time

        return time.time() + self.ahead_s


def store_at(url: str, max_bytes: int = 10**6) -> tuple[ReplayStore, ObjectStore, Clock]:
    objects, clock = open_store(url), Clock()
    return ReplayStore(Blobs(objects), ttl_s=600, max_bytes=max_bytes, clock=clock), objects, clock


def paths(objects: ObjectStore) -> set[str]:
    return {meta["path"] for chunk in obstore.list(objects, "replays") for meta in chunk}


async def test_an_answer_is_found_by_its_id(url: str) -> None:
    store, _, _ = store_at(url)
    one, other = str(uuid4()), str(uuid4())
    assert await store.find(one) is None
    await store.keep(one, Replay(PRINT, b"an answer"))
    await store.keep(other, Replay(PRINT, b""))
    assert await store.find(one) == Replay(PRINT, b"an answer")
    assert await store.find(other) == Replay(PRINT, b"")


async def test_an_answer_is_never_replaced(url: str) -> None:
    store, _, _ = store_at(url)
    name = str(uuid4())
    await store.keep(name, Replay(PRINT, b"the first"))
    await store.keep(name, Replay(b"q" * 32, b"the second"))
    assert await store.find(name) == Replay(PRINT, b"the first")


async def test_an_answer_expires(url: str) -> None:
    store, objects, clock = store_at(url)
    names = [str(uuid4()) for _ in range(2)]
    for name in names:
        await store.keep(name, Replay(PRINT, b"an answer"))
    clock.ahead_s = 590
    assert await store.find(names[0]) is not None
    clock.ahead_s = 610
    assert await store.find(names[0]) is None, "though nothing was swept"
    await store.keep(names[0], Replay(PRINT, b"a new one"))
    clock.ahead_s = 0
    assert await store.find(names[0]) == Replay(PRINT, b"a new one")
    clock.ahead_s = 1e6
    await store.sweep()
    assert paths(objects) == set()


async def test_answers_stay_within_their_bytes_and_the_oldest_go_first(tmp_path: Path) -> None:
    store, objects, _ = store_at(tmp_path.as_uri(), max_bytes=1000)
    names = [str(uuid4()) for _ in range(8)]
    for name in names:
        await store.keep(name, Replay(PRINT, b"x" * 200))  # about 300 bytes with its checksum
        await asyncio.sleep(0.02)  # so that their times differ
    found = [name for name in names if await store.find(name) is not None]
    assert found == names[-len(found) :]
    assert 2 <= len(found) <= 3
    await store.keep(names[0], Replay(PRINT, b"x" * 2000))
    assert await store.find(names[0]) is None, "what is larger than all together is not kept"
    assert len(paths(objects)) == len(found)


async def test_answers_of_other_servers_count_too(tmp_path: Path) -> None:
    stores = [store_at(tmp_path.as_uri(), max_bytes=1000)[0] for _ in range(2)]
    objects = open_store(tmp_path.as_uri())
    for number in range(8):
        await stores[number % 2].keep(str(uuid4()), Replay(PRINT, b"x" * 200))
    for store in stores:
        await store.sweep()
    assert len(paths(objects)) == 3


async def test_answers_are_limited_by_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENTRIES", 5)
    store, objects, _ = store_at(tmp_path.as_uri())
    for _ in range(12):
        await store.keep(str(uuid4()), Replay(PRINT, b""))
    assert len(paths(objects)) == 5


@pytest.mark.parametrize("content", [b"", b"no checksum", b"0" * 64 + b"\nanother content"])
async def test_a_damaged_answer_is_none_and_gives_way_to_a_new_one(url: str, content: bytes) -> None:
    store, objects, _ = store_at(url)
    name = str(uuid4())
    await obstore.put_async(objects, f"replays/{name}", content)
    assert await store.find(name) is None
    await store.keep(name, Replay(PRINT, b"an answer"))
    assert await store.find(name) == Replay(PRINT, b"an answer")


async def test_other_objects_are_left_alone(url: str) -> None:
    store, objects, clock = store_at(url)
    for path in ("replays/README", "replays/more/files", "inversions/x.safetensors"):
        await obstore.put_async(objects, path, b"mine")
    clock.ahead_s = 1e6
    await store.sweep()
    assert paths(objects) == {"replays/README", "replays/more/files"}


# --- two servers of one store ---------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def two(shared_url: str) -> AsyncIterator[tuple[Wire, Wire]]:
    async with AsyncExitStack() as stack:
        settings = SETTINGS.model_copy(update={"store_url": shared_url})
        yield (
            await stack.enter_async_context(started(settings)),
            await stack.enter_async_context(started(settings)),
        )


def stream(request: edit_service_pb2.EditRequest) -> edit_service_pb2.StreamEditRequest:
    return edit_service_pb2.StreamEditRequest(edit=request)


def invert(request_id: str) -> inversion_service_pb2.InvertRequest:
    ddim = inversion_service_pb2.InversionParameters(ddim=inversion_service_pb2.DdimInversion())
    return inversion_service_pb2.InvertRequest(request_id=request_id, image=photo(), parameters=ddim)


async def test_a_repeat_gets_its_answer_from_another_server(two: tuple[Wire, Wire]) -> None:
    here, there = two
    request, mask = edit(request_id=str(uuid4())), edit("diffedit", request_id=str(uuid4()))
    inversion = invert(str(uuid4()))
    first = [
        await here.edits.Edit(request),
        await here.edits.ComputeMask(edit_service_pb2.ComputeMaskRequest(edit=mask)),
        await here.inversions.Invert(inversion),
    ]
    again = [
        await there.edits.Edit(request),
        await there.edits.ComputeMask(edit_service_pb2.ComputeMaskRequest(edit=mask)),
        await there.inversions.Invert(inversion),
    ]
    assert again == first
    assert there.engine.jobs == []
    assert there.metric(REPLAYS, result="stored") == 3
    events = [event async for event in there.edits.StreamEdit(stream(request))]
    assert [event.WhichOneof("event") for event in events] == ["accepted", "result"]
    assert events[-1].result == first[0]
    assert there.metric(REPLAYS, result="replayed") == 1, "from now on it is in memory here too"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_stream_and_a_call_with_one_id_are_one_request_on_every_server(
    two: tuple[Wire, Wire], streamed: bool
) -> None:
    request = edit(request_id=str(uuid4()))
    here, there = two
    if streamed:
        first = [event async for event in here.edits.StreamEdit(stream(request))][-1].result
        assert await there.edits.Edit(request) == first
    else:
        first = await here.edits.Edit(request)
        events = [event async for event in there.edits.StreamEdit(stream(request))]
        assert events[-1].result == first
    assert there.engine.jobs == []


@pytest.mark.parametrize("other", ["payload", "rpc"])
async def test_an_id_with_another_request_is_refused_on_every_server(two: tuple[Wire, Wire], other: str) -> None:
    here, there = two
    request_id = str(uuid4())
    await here.edits.Edit(edit(request_id=request_id, seed=1))
    if other == "payload":
        call = there.edits.Edit(edit(request_id=request_id.upper(), seed=2))
    else:
        call = there.inversions.Invert(invert(request_id))
    assert (await refused(call)).reason == "REQUEST_ID_REUSED"
    assert there.engine.jobs == []
    assert (await there.edits.Edit(edit(request_id=request_id, seed=1))).image.content


async def test_a_request_that_runs_elsewhere_is_not_joined(two: tuple[Wire, Wire]) -> None:
    """Both compute it, both answer; one of the two answers stays."""
    here, there = two
    here.engine.held = True
    request = edit(request_id=str(uuid4()), seed=1)
    first = here.edits.Edit(request)
    await here.engine.submitted.wait()
    second = await there.edits.Edit(request)
    here.engine.finish(here.engine.handles[0])
    assert (await first).image == second.image


async def test_a_refusal_is_not_left_for_others(two: tuple[Wire, Wire]) -> None:
    from underpaint_server.errors import QueueFull

    here, there = two
    here.engine.refusals = [QueueFull("full")]
    request = edit(request_id=str(uuid4()))
    assert (await refused(here.edits.Edit(request))).reason == "QUEUE_FULL"
    assert (await there.edits.Edit(request)).image.content
    assert len(there.engine.jobs) == 1


async def test_without_an_id_nothing_is_left(two: tuple[Wire, Wire], shared_url: str) -> None:
    await two[0].edits.Edit(edit(seed=1))
    assert paths(open_store(shared_url)) == set()


@pytest.mark.parametrize("update", [{"replay_bytes": 0}, {"store_url": "memory:///"}])
async def test_where_nothing_is_kept_nothing_is_looked_for(shared_url: str, update: dict[str, Any]) -> None:
    async with started(SETTINGS.model_copy(update={"store_url": shared_url} | update)) as wire:
        assert wire.context.stores.replays is None
        assert (await wire.edits.Edit(edit(request_id=str(uuid4())))).image.content
    assert paths(open_store(shared_url)) == set()


@pytest.mark.parametrize("failing", ["find", "keep", "both"])
@pytest.mark.parametrize("how", ["unreachable", "silent"])
async def test_an_edit_does_not_fail_with_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, how: str
) -> None:
    asked = 0

    async def unreachable(*_: Any) -> Any:
        nonlocal asked
        asked += 1
        if how == "silent":
            await asyncio.Event().wait()
        raise StoreUnavailable("the object store is unreachable")

    monkeypatch.setattr("underpaint_server.rpc.calls.idempotency._STORE_S", 0.05)
    for name in ("find", "keep") if failing == "both" else (failing,):
        monkeypatch.setattr(ReplayStore, name, unreachable)
    async with started(SETTINGS.model_copy(update={"store_url": tmp_path.as_uri()})) as wire:
        request = edit(request_id=str(uuid4()))
        first = await wire.edits.Edit(request)
        assert await wire.edits.Edit(request) == first
        assert len(wire.engine.jobs) == 1
        assert asked == 1
        await wire.edits.Edit(edit(request_id=str(uuid4())))
        assert asked == 1, "others do not wait for it too"
        monkeypatch.undo()
        wire.context.idempotency._ask_at = 0.0
        await wire.edits.Edit(edit(request_id=str(uuid4())))
    assert len(paths(open_store(tmp_path.as_uri()))) == 1, "afterwards answers are left there again"


async def test_an_answer_that_is_not_one_is_computed_anew(two: tuple[Wire, Wire]) -> None:
    """As a later version may leave it."""
    here, there = two
    request = edit(request_id=str(uuid4()), seed=1)
    first = await here.edits.Edit(request)
    store = here.context.stores.replays
    assert store is not None
    kept = await store.find(request.request_id)
    assert kept is not None
    await store._blobs.remove(f"replays/{request.request_id}")
    await store.keep(request.request_id, Replay(kept.fingerprint, b"\xff"))
    assert (await there.edits.Edit(request)).image == first.image
    assert len(there.engine.jobs) == 1


async def test_expired_answers_are_removed_in_the_background(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"store_url": tmp_path.as_uri(), "replay_ttl_s": 0.2})
    async with started(settings) as wire:
        await wire.edits.Edit(edit(request_id=str(uuid4())))
        await until(lambda: not paths(open_store(tmp_path.as_uri())))
