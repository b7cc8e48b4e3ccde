"""Directions and operations in a place: what is created once, what is damaged, what is left."""

import asyncio
import hashlib
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from obstore.store import LocalStore
from safetensors.numpy import save
from safetensors.torch import save as save_torch
from support.jobs import disc
from underpaint_server.errors import (
    DirectionExists,
    DirectionNotFound,
    DirectionsFull,
    EtagMismatch,
    OperationNotFound,
    StoreCorrupt,
    StoreUnavailable,
)
from underpaint_server.jobs import Descent, Direction, Generated, LearnOptions, LearnState, Photo, Sampler, Search
from underpaint_server.stores.blobs import Blobs, sealed, unsealed
from underpaint_server.stores.directions import DirectionStore, decode, encode
from underpaint_server.stores.operations import Claim, OperationStore, Task
from underpaint_server.stores.urls import open_store

OPTIONS = LearnOptions("a dog", "a cat", "", 3, Sampler.PLMS, 5.0, 1, 0.0, 0.05, Descent(4, 0.05), 2**64 - 1)
DIRECTION = Direction("Joy", "toy", "d" * 64, OPTIONS, (1.0, 0.5, -0.25), (0.3, 0.1), "vae", 2, "0" * 32)
TASK = Task("toy", "d" * 64, "joy", "Joy", OPTIONS, (None, Generated("a dog", 3, 8, 8, 3), None), "", "")
NAME = "0123456789abcdef" * 2
THIRD = 1 / 3
ETAG = "a2898347fa3c8da675ff141fd0edbd0376c2e0f0535ec7ef050715ef1e830a9e"
STATE = LearnState(2, (1.0, THIRD, 5e-324), (0.1, 0.2, -0.0), (1e300, 0.2, 0.3), (0.7, THIRD), (1.0, 2.0, 3.0))


@pytest.fixture
def blobs(url: str) -> Blobs:
    return Blobs(open_store(url))


def directions(blobs: Blobs, **options: Any) -> DirectionStore:
    return DirectionStore(blobs, **{"max_entries": 10, "max_bytes": 1_000_000} | options)


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


async def test_a_direction_comes_back_as_it_was(blobs: Blobs) -> None:
    store = directions(blobs, clock=lambda: 1000.5)
    made = await store.create("joy", DIRECTION)
    assert await store.get("joy") == made
    assert (made.direction, made.create_time) == (DIRECTION, datetime.fromtimestamp(1000.5, UTC))
    assert (await store.list(10, "")) == ([made], "")
    search = replace(DIRECTION, options=replace(OPTIONS, method=Search((1,), (0.2,))), weights=(1.0, 0.1, 0.1))
    assert (await store.create("search", search)).direction.options == search.options
    assert (await store.get("search")).direction.weights == pytest.approx((1.0, 0.1, 0.1))
    with pytest.raises(DirectionExists):
        await store.create("joy", search)
    assert await store.get("joy") == made


async def test_only_what_was_seen_is_deleted(blobs: Blobs) -> None:
    store = directions(blobs)
    made = await store.create("joy", DIRECTION)
    with pytest.raises(EtagMismatch):
        await store.delete("joy", "0" * 64)
    await store.delete("joy", made.etag)
    for call in (store.get("joy"), store.export("joy"), store.delete("joy"), store.delete("joy", made.etag)):
        with pytest.raises(DirectionNotFound):
            await call
    assert await store.list(10, "") == ([], "")


async def test_a_listing_sees_what_others_do(tmp_path: Path) -> None:
    one, two = (directions(Blobs(LocalStore(tmp_path))) for _ in range(2))
    await one.create("joy", DIRECTION)
    assert [entry.name for entry in (await two.list(10, ""))[0]] == ["joy"]
    await one.delete("joy")
    await one.create("joy", replace(DIRECTION, display_name="Mirth"))
    assert [entry.direction.display_name for entry in (await two.list(10, ""))[0]] == ["Mirth"]


async def test_a_damaged_direction_is_told_passed_over_and_can_be_deleted(tmp_path: Path) -> None:
    store = directions(Blobs(LocalStore(tmp_path)))
    await store.create("good", DIRECTION)
    await store.create("bad", DIRECTION)
    damaged(tmp_path / "directions" / "bad.safetensors")
    for call in (store.get("bad"), store.export("bad"), store.delete("bad", "0" * 64)):
        with pytest.raises(StoreCorrupt):
            await call
    assert [entry.name for entry in (await store.list(10, ""))[0]] == ["good"]
    await store.delete("bad")
    with pytest.raises(DirectionNotFound):
        await store.get("bad")


def test_a_direction_of_format_1_is_still_read() -> None:
    """Its checksum leaves the tensor's name out. The file was written by a server of that time."""
    data = (Path(__file__).parents[2] / "data" / "direction-format-1.safetensors").read_bytes()
    entry = decode("ripe", data)
    assert entry.direction.weights == (1.0, 0.5, -0.25)
    assert entry.direction.options.target_prompt == "a green apple"
    assert entry.etag == ETAG
    with pytest.raises(StoreCorrupt, match="checksum"):
        decode("ripe", data[:-1] + b"\x01")


def test_a_file_of_a_type_that_numpy_lacks_is_refused() -> None:
    data = save_torch({"weights": torch.ones(3, dtype=torch.bfloat16)}, metadata={"underpaint": "{}"})
    with pytest.raises(StoreCorrupt, match="BF16"):
        decode("x", data)


BAD = {
    "a weight short": replace(DIRECTION, weights=(1.0, 0.0)),
    "no weights": replace(DIRECTION, weights=()),
    "not a number": replace(DIRECTION, weights=(1.0, float("nan"), 0.0)),
    "endless": replace(DIRECTION, weights=(1.0, float("inf"), 0.0)),
    "too large": replace(DIRECTION, weights=(1.0, -1001.0, 0.0)),
    "a loss that is none": replace(DIRECTION, losses=(float("nan"),)),
    "no prompt": replace(DIRECTION, options=replace(OPTIONS, source_prompt=" ")),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_whose_checksum_is_right_and_whose_content_is_wrong_is_refused(case: str) -> None:
    data = encode(BAD[case], datetime.now(UTC))
    with pytest.raises(StoreCorrupt):
        decode("x", data)


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(StoreCorrupt, match="time zone"):
        decode("x", encode(DIRECTION, datetime(2026, 1, 1)))


async def test_an_operation_comes_back_to_the_bit(blobs: Blobs) -> None:
    photos = [disc(8), disc(16)]
    store, other = OperationStore(blobs), OperationStore(blobs)
    assert await store.create(NAME, TASK, photos)
    assert await other.task(NAME) == TASK
    first, drawn, second = await other.examples(NAME, TASK)
    assert isinstance(first, Photo)
    assert isinstance(second, Photo)
    assert drawn == TASK.examples[1]
    assert np.array_equal(first.pixels, photos[0])
    assert np.array_equal(second.pixels, photos[1])
    assert await store.save_state(NAME, STATE)
    seen = await other.summary(NAME)
    assert (seen.claim, seen.iteration, seen.done_at) == (0, 2, None)
    assert repr(await other.state_of(seen)) == repr(STATE)


async def test_examples_without_a_record_are_read(blobs: Blobs) -> None:
    """Earlier servers wrote the pixels alone, as a plain safetensors file."""
    store = OperationStore(blobs)
    assert await store.create(NAME, TASK, [])
    pixels = {f"{i:02d}": np.full((2, 3, 3), i, np.uint8) for i in range(2)}
    path = f"operations/{NAME}/examples"
    await blobs.create(path, sealed(path, save(pixels)))
    first, drawn, second = await store.examples(NAME, TASK)
    assert isinstance(first, Photo)
    assert isinstance(second, Photo)
    assert np.array_equal([first.pixels, second.pixels], list(pixels.values()))
    assert drawn == TASK.examples[1]


async def test_everything_of_an_operation_is_created_once(blobs: Blobs) -> None:
    store = OperationStore(blobs)
    assert await store.create(NAME, TASK, [])
    assert not await store.create(NAME, replace(TASK, direction="other"), [])
    claims = [Claim(f"owner {k}", 30, 0, 0) for k in range(8)]
    assert sum(await asyncio.gather(*(store.claim(NAME, 1, claim) for claim in claims))) == 1
    assert await store.claim(NAME, 2, replace(claims[0], released=True))
    older = replace(STATE, losses=(0.1,))
    assert await store.save_state(NAME, STATE)
    assert await store.save_state(NAME, STATE), "what is there and equal is kept"
    assert not await store.save_state(NAME, older)
    assert sorted(await asyncio.gather(*(store.finish(NAME, str(k).encode()) for k in range(8)))) == [False] * 7 + [
        True
    ]
    seen = await store.summary(NAME)
    assert await store.claim_of(seen) == replace(claims[0], released=True)
    assert await store.state_of(seen) == STATE
    assert await store.is_done(NAME)


async def test_what_ended_leaves_only_its_end_and_what_is_forgotten_nothing(blobs: Blobs) -> None:
    store = OperationStore(blobs)
    await store.create(NAME, TASK, [disc(8), disc(8)])
    await store.claim(NAME, 1, Claim("me", 30, 0, 0))
    await store.save_state(NAME, STATE)
    await store.finish(NAME, b"the end")
    await store.clear(await store.summary(NAME))
    assert {Path(blob.path).name for blob in await blobs.below("operations")} == {"request", "done"}
    assert await store.outcome(NAME) == b"the end"
    await store.forget(await store.summary(NAME))
    assert await blobs.below("operations") == []
    assert await store.scan() == {}
    for name in (NAME, "?", "../x"):
        with pytest.raises(OperationNotFound):
            await store.summary(name)
    assert await store.task(NAME) is None


async def test_damage_is_told(tmp_path: Path) -> None:
    store = OperationStore(Blobs(LocalStore(tmp_path)))
    await store.create(NAME, TASK, [disc(8), disc(8)])
    await store.claim(NAME, 1, Claim("me", 30, 0, 0))
    await store.save_state(NAME, STATE)
    seen, fresh = await store.summary(NAME), OperationStore(Blobs(LocalStore(tmp_path)))
    for path in (tmp_path / "operations" / NAME).iterdir():
        damaged(path)
    for call in (fresh.task(NAME), fresh.examples(NAME, TASK), fresh.claim_of(seen), fresh.state_of(seen)):
        with pytest.raises(StoreCorrupt):
            await call
    assert unsealed("a", sealed("a", b"x")) == b"x"
    for data in (b"", b"x", sealed("a", b"x")[:-1], sealed("a", b"x") + b"y", sealed("b", b"x"), sealed("a\nx", b"")):
        with pytest.raises(StoreCorrupt):
            unsealed("a", data)


def test_what_earlier_servers_sealed_is_read() -> None:
    data = hashlib.sha256(b"x").hexdigest().encode() + b"\nx"
    assert unsealed("anywhere", data) == b"x"


async def test_an_intact_object_under_another_name_is_told(tmp_path: Path) -> None:
    store, other = OperationStore(Blobs(LocalStore(tmp_path))), "f" * 32
    await store.create(NAME, TASK, [disc(8), disc(8)])
    await store.finish(NAME, b"the end")
    await store.create(other, replace(TASK, direction="other"), [disc(9), disc(9)])
    for part in ("request", "examples", "done"):
        shutil.copy(tmp_path / "operations" / NAME / part, tmp_path / "operations" / other / part)
    fresh = OperationStore(Blobs(LocalStore(tmp_path)))
    for call in (fresh.task(other), fresh.examples(other, TASK), fresh.outcome(other)):
        with pytest.raises(StoreCorrupt):
            await call
    made = directions(Blobs(LocalStore(tmp_path)))
    await made.create("joy", DIRECTION)
    shutil.copy(tmp_path / "directions" / "joy.safetensors", tmp_path / "directions" / "mirth.safetensors")
    for direction_call in (made.get("mirth"), made.export("mirth")):
        with pytest.raises(StoreCorrupt, match="directions/mirth is damaged"):
            await direction_call
    assert [entry.name for entry in (await made.list(10, ""))[0]] == ["joy"]


async def test_a_direction_that_an_earlier_server_stored_is_read(tmp_path: Path) -> None:
    data = encode(DIRECTION, datetime.fromtimestamp(0, UTC))
    (tmp_path / "directions").mkdir()
    (tmp_path / "directions" / "joy.safetensors").write_bytes(data)
    store = directions(Blobs(LocalStore(tmp_path)))
    assert (await store.get("joy")).direction == DIRECTION
    assert await store.export("joy") == data


async def test_directions_beyond_the_limits_find_no_room(blobs: Blobs) -> None:
    store = directions(blobs, max_entries=3, max_bytes=5000)
    await store.create("a", DIRECTION)
    size = store.total_bytes
    assert (store.entries, size > 500) == (1, True)
    await store.check_room(2, 5000 - size)
    for entries, more in ((3, 0), (1, 5001 - size)):
        with pytest.raises(DirectionsFull, match="delete some"):
            await store.check_room(entries, more)
    another = directions(blobs, max_entries=3, max_bytes=5000)
    await another.create("b", DIRECTION)
    await store.measure()
    assert (store.entries, store.total_bytes) == (2, 2 * size)
    await store.delete("b")
    assert (store.entries, store.total_bytes) == (1, size)


async def test_a_place_out_of_reach_is_told(tmp_path: Path) -> None:
    blobs = Blobs(LocalStore(tmp_path))
    (tmp_path / "operations").write_text("a file where a folder should be")
    with pytest.raises(StoreUnavailable):
        await OperationStore(blobs).create(NAME, TASK, [])
