"""The store over its real places: what is put comes back, expires, gives way, and is never served damaged."""

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import obstore
import pytest
import pytest_asyncio
from moto.server import ThreadedMotoServer
from safetensors.numpy import load
from support.waiting import until
from underpaint_server.errors import FieldInvalid, ImageTooLarge, InversionExpired, StoreCorrupt, StoreUnavailable
from underpaint_server.jobs import Inversion, InversionOptions
from underpaint_server.methods.ddim.options import DdimInversion
from underpaint_server.methods.edict.options import EdictInversion
from underpaint_server.stores import InversionStore
from underpaint_server.stores.urls import open_store
from underpaint_server.telemetry import Metrics

pytestmark = pytest.mark.asyncio

TTL_S = 3600.0
FITTING = {"fit": 1, "source_width": 640, "source_height": 480}
Opener = Callable[..., Awaitable[InversionStore]]


@dataclass
class Clock:
    """The real time, moved ahead at will."""

    ahead_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def name(number: int) -> str:
    return f"{number:064x}"


def inversion(number: int, values: int = 192) -> Inversion:
    options = InversionOptions(EdictInversion(0.93), 50, 0.8, 3.0, f"photo {number}")
    arrays = {key: np.full((3, values // 3), number + offset) for offset, key in enumerate(("source", "x", "y"), 1)}
    return Inversion("mini", "d" * 64, options, 64, 64, None, {key: a.astype(float) for key, a in arrays.items()})


@pytest_asyncio.fixture
async def opener(clock: Clock) -> AsyncIterator[Opener]:
    """Opens stores, and closes them in the end."""
    opened: list[InversionStore] = []

    async def opens(
        url: str,
        *,
        max_bytes: int = 1 << 20,
        max_entry_bytes: int = 1 << 30,
        ttl_s: float = TTL_S,
        metrics: Metrics | None = None,
    ) -> InversionStore:
        store = await InversionStore.open(
            open_store(url),
            max_bytes=max_bytes,
            max_entry_bytes=max_entry_bytes,
            ttl_s=ttl_s,
            metrics=metrics or Metrics(),
            clock=clock,
        )
        opened.append(store)
        return store

    yield opens
    for store in opened:
        await store.close()


def counted(metrics: Metrics, metric: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"underpaint_inversion_store_{metric}_total", labels)


# --- put, get, head, export, delete -------------------------------------------------------------------------------


async def test_what_is_put_comes_back(url: str, opener: Opener) -> None:
    store = await opener(url)
    put = await store.put(name(1), inversion(1), FITTING)
    got, entry = await store.get(name(1))
    assert entry.fitting == put.fitting == FITTING
    assert entry.create_time == put.create_time
    assert (got.options, got.model, got.width) == (inversion(1).options, "mini", 64)
    assert all(np.array_equal(got.arrays[key], array) for key, array in inversion(1).arrays.items())
    assert {array.dtype for array in got.arrays.values()} == {np.dtype(np.float64)}
    assert entry.inversion.arrays == {}


async def test_what_is_not_there_says_so(url: str, opener: Opener) -> None:
    metrics = Metrics()
    store = await opener(url, metrics=metrics)
    for reading in (store.get, store.head, store.export):
        with pytest.raises(InversionExpired) as caught:
            await reading(name(1))
        assert caught.value.metadata["resource_name"] == f"inversions/{name(1)}"
    assert not await store.delete(name(1))
    assert counted(metrics, "requests", result="miss") == 2


@pytest.mark.parametrize("bad", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n"])
async def test_a_malformed_name_reaches_no_place(bad: str, opener: Opener) -> None:
    store = await opener("memory:///")
    for reading in (store.get, store.head, store.export):
        with pytest.raises(InversionExpired):
            await reading(bad)
    assert not await store.delete(bad)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        await store.put(bad, inversion(1), {})


async def test_a_name_stands_for_its_content(url: str, opener: Opener) -> None:
    store = await opener(url)
    first = await store.put(name(1), inversion(1), FITTING)
    second = await store.put(name(1), replace(inversion(1), width=32), {})
    assert (second.create_time, second.inversion.width, second.fitting) == (first.create_time, 64, FITTING)
    assert store.entries == 1


async def test_a_verified_inversion_replaces_the_unverified(url: str, opener: Opener) -> None:
    store = await opener(url)
    first = await store.put(name(1), inversion(1), FITTING)
    verified = replace(inversion(1), reconstruction_psnr_db=42.5, reconstruction_max_abs_error=1e-14)
    second = await store.put(name(1), verified, FITTING, replace=True)
    assert (await store.get(name(1)))[0].reconstruction_psnr_db == 42.5
    assert second.create_time == first.create_time
    assert store.total_bytes == second.size_bytes


async def test_export_is_the_safetensors_file(url: str, opener: Opener) -> None:
    store = await opener(url)
    entry = await store.put(name(1), inversion(1), FITTING)
    data = await store.export(name(1))
    assert len(data) == entry.size_bytes == store.total_bytes
    assert np.array_equal(load(data)["y"], inversion(1).arrays["y"])


async def test_a_deleted_inversion_is_gone(url: str, opener: Opener) -> None:
    store = await opener(url)
    await store.put(name(1), inversion(1), FITTING)
    assert await store.delete(name(1))
    assert not await store.delete(name(1))
    assert (store.entries, store.total_bytes) == (0, 0)
    with pytest.raises(InversionExpired):
        await store.get(name(1))


# --- expiry -------------------------------------------------------------------------------------------------------


async def test_using_moves_the_expiry_and_looking_does_not(url: str, opener: Opener, clock: Clock) -> None:
    store = await opener(url)
    put = await store.put(name(1), inversion(1), FITTING)
    clock.ahead_s = TTL_S / 2
    assert (await store.head(name(1))).expire_time == put.expire_time
    _, used = await store.get(name(1))
    assert used.expire_time - put.expire_time >= timedelta(seconds=TTL_S / 2)
    assert (await store.head(name(1))).expire_time == used.expire_time
    clock.ahead_s = TTL_S * 3 / 4
    await store.export(name(1))
    clock.ahead_s = TTL_S * 3 / 2
    assert (await store.head(name(1))).name == name(1)


async def test_an_unused_inversion_expires(url: str, opener: Opener, clock: Clock) -> None:
    metrics = Metrics()
    store = await opener(url, metrics=metrics)
    await store.put(name(1), inversion(1), FITTING)
    clock.ahead_s = TTL_S + 10
    with pytest.raises(InversionExpired):
        await store.get(name(1))
    assert store.entries == 0
    assert counted(metrics, "requests", result="expired") == 1
    assert counted(metrics, "evictions", reason="ttl") == 1


async def test_the_expired_may_be_put_again(url: str, opener: Opener, clock: Clock) -> None:
    store = await opener(url)
    first = await store.put(name(1), inversion(1), FITTING)
    clock.ahead_s = TTL_S + 10
    second = await store.put(name(1), replace(inversion(1), width=32), {})
    assert second.create_time > first.create_time
    assert second.inversion.width == 32


async def test_putting_removes_what_expired_meanwhile(url: str, opener: Opener, clock: Clock) -> None:
    store = await opener(url)
    await store.put(name(1), inversion(1), FITTING)
    clock.ahead_s = TTL_S + 10
    await store.put(name(2), inversion(2), FITTING)
    assert [entry.name for entry in (await store.list(10, ""))[0]] == [name(2)]
    assert store.entries == 1


async def test_the_expired_goes_without_anyone_asking(
    file_url: str, folder: Path, opener: Opener, clock: Clock
) -> None:
    store = await opener(file_url, ttl_s=0.2)
    await store.put(name(1), inversion(1), FITTING)
    await until(lambda: not store.entries and not list(folder.glob("*")))


async def test_a_restart_removes_what_expired_meanwhile(file_url: str, folder: Path, opener: Opener) -> None:
    await (await opener(file_url)).put(name(1), inversion(1), FITTING)
    long_ago = time.time() - 2 * TTL_S
    os.utime(folder / f"{name(1)}.safetensors", (long_ago, long_ago))
    assert (await opener(file_url)).entries == 0
    assert list(folder.iterdir()) == []


# --- bytes --------------------------------------------------------------------------------------------------------


async def test_the_least_recently_used_gives_way(url: str, opener: Opener, clock: Clock) -> None:
    metrics = Metrics()
    size = (await (await opener("memory:///")).put(name(1), inversion(1), FITTING)).size_bytes
    store = await opener(url, max_bytes=3 * size + size // 2, metrics=metrics)
    for number in (1, 2, 3):
        clock.ahead_s += 2
        await store.put(name(number), inversion(number), FITTING)
    clock.ahead_s += 2
    await store.get(name(1))
    await store.put(name(4), inversion(4), FITTING)
    assert {entry.name for entry in (await store.list(10, ""))[0]} == {name(1), name(3), name(4)}
    assert counted(metrics, "evictions", reason="bytes") == 1
    assert store.total_bytes <= 3 * size + size // 2
    with pytest.raises(InversionExpired):
        await store.get(name(2))


async def test_one_larger_than_the_store_is_refused(url: str, opener: Opener) -> None:
    store = await opener(url, max_bytes=20_000)
    kept = await store.put(name(1), inversion(1), FITTING)
    with pytest.raises(ImageTooLarge, match="more than the limit of 20000") as caught:
        await store.put(name(2), inversion(2, values=3000), FITTING)
    assert caught.value.metadata["limit"] == "20000"
    assert int(caught.value.metadata["actual"]) > 3 * 8 * 3000
    assert (store.entries, store.total_bytes) == (1, kept.size_bytes)


# --- restarts and replicas ----------------------------------------------------------------------------------------


async def test_a_restart_finds_everything(shared_url: str, opener: Opener) -> None:
    before = await opener(shared_url)
    entries = {number: await before.put(name(number), inversion(number), FITTING) for number in range(5)}
    after = await opener(shared_url)
    assert (after.entries, after.total_bytes) == (before.entries, before.total_bytes)
    for number, entry in entries.items():
        found = await after.head(name(number))
        assert (found.create_time, found.fitting, found.size_bytes) == (entry.create_time, FITTING, entry.size_bytes)
        assert found.inversion.options == inversion(number).options


async def test_a_long_prompt_is_found_too(shared_url: str, opener: Opener) -> None:
    options = replace(inversion(1).options, source_prompt="ü" * 30_000, method=DdimInversion())
    await (await opener(shared_url)).put(name(1), replace(inversion(1), options=options), FITTING)
    assert (await (await opener(shared_url)).head(name(1))).inversion.options == options


async def test_another_replica_sees_put_replace_and_delete(shared_url: str, opener: Opener) -> None:
    one, other = await opener(shared_url), await opener(shared_url)
    await one.put(name(1), inversion(1), FITTING)
    assert (await other.get(name(1)))[0].options.source_prompt == "photo 1"
    await one.put(name(1), replace(inversion(1), reconstruction_psnr_db=40.0), FITTING, replace=True)
    assert [entry.inversion.reconstruction_psnr_db for entry in (await other.list(10, ""))[0]] == [40.0]
    await one.delete(name(1))
    assert await other.list(10, "") == ([], "")
    with pytest.raises(InversionExpired):
        await other.get(name(1))
    assert other.entries == 0


async def test_replicas_that_put_at_once_agree(shared_url: str, opener: Opener) -> None:
    replicas = [await opener(shared_url) for _ in range(4)]
    entries = await asyncio.gather(*(replica.put(name(1), inversion(1), FITTING) for replica in replicas))
    assert len({entry.create_time for entry in entries}) == 1
    assert [replica.entries for replica in replicas] == [1] * 4


async def test_a_use_by_another_replica_keeps_it(file_url: str, folder: Path, opener: Opener, clock: Clock) -> None:
    one, other = await opener(file_url), await opener(file_url)
    await one.put(name(1), inversion(1), FITTING)
    clock.ahead_s = TTL_S / 2
    await other.get(name(1))
    # The files bear real times; the other replica's use was half a TTL ahead of them.
    later = time.time() + TTL_S / 2
    os.utime(folder / f"{name(1)}.used", (later, later))
    clock.ahead_s = TTL_S + 10
    await one.put(name(2), inversion(2), FITTING)
    assert (await one.get(name(1)))[1].name == name(1)


async def test_uses_are_put_on_record_sparingly(file_url: str, folder: Path, opener: Opener, clock: Clock) -> None:
    store = await opener(file_url)
    await store.put(name(1), inversion(1), FITTING)
    for _ in range(10):
        await store.get(name(1))
    assert not (folder / f"{name(1)}.used").exists()
    clock.ahead_s = TTL_S / 10
    await store.get(name(1))
    assert (folder / f"{name(1)}.used").stat().st_size == 0


async def test_foreign_objects_are_left_alone(file_url: str, folder: Path, opener: Opener) -> None:
    folder.mkdir(parents=True)
    (folder / "README.txt").write_text("not ours")
    store = await opener(file_url, max_bytes=3000)
    for number in range(5):
        await store.put(name(number), inversion(number, values=3), FITTING)
    assert store.entries < 5
    assert (folder / "README.txt").read_text() == "not ours"


async def test_large_inversions_leave_half_of_the_store_to_the_others(url: str, opener: Opener) -> None:
    store = await opener(url, max_bytes=4_000_000)
    small = [name(k) for k in range(8)]
    for k, each in enumerate(small):
        await store.put(each, inversion(k), FITTING)
    for k in range(20):
        await store.put(name(100 + k), inversion(100 + k, 48_000), FITTING)  # 1.15 MB each
    kept = {entry.name for entry in (await store.list(100, ""))[0]}
    assert kept >= set(small), "the small ones were used longer ago, and stay"
    assert kept - set(small) == {name(117), name(118), name(119)}


async def test_small_inversions_leave_half_of_the_store_to_large_ones(opener: Opener) -> None:
    store = await opener("memory:///", max_bytes=4_000_000)
    await store.put(name(1), inversion(1, 48_000), FITTING)
    size = (await store.put(name(2), inversion(2, 600), FITTING)).size_bytes
    assert size <= 4_000_000 // 256
    for k in range(3, 3 + 4_800_000 // size):
        await store.put(name(k), inversion(k, 600), FITTING)
    kept = {entry.name for entry in (await store.list(1000, ""))[0]}
    assert name(1) in kept
    assert name(2) not in kept


async def test_an_inversion_larger_than_half_of_the_store_is_there_once_it_is_stored(opener: Opener) -> None:
    store = await opener("memory:///", max_bytes=4_000_000)
    size = (await store.put(name(0), inversion(0, 600), FITTING)).size_bytes
    assert size <= 4_000_000 // 256
    for k in range(1, 3_000_000 // size):
        await store.put(name(k), inversion(k, 600), FITTING)
    large = await store.put(name(9999), inversion(9999, 100_000), FITTING)
    assert 2_000_000 < large.size_bytes < 4_000_000
    await store.get(name(9999))
    assert store.total_bytes <= 4_000_000


async def test_a_store_opens_with_less_room_than_its_only_inversion_takes(opener: Opener, file_url: str) -> None:
    """After its limit was lowered, or where another server of the store has a larger one."""
    store = await opener(file_url)
    size = (await store.put(name(1), inversion(1), FITTING)).size_bytes
    store = await opener(file_url, max_bytes=size - 1)
    assert store.total_bytes == 0


async def test_one_inversion_has_a_limit_of_its_own(opener: Opener) -> None:
    store = await opener("memory:///", max_entry_bytes=20_000)
    await store.put(name(1), inversion(1), FITTING)
    with pytest.raises(ImageTooLarge, match="more than the limit of 20000"):
        await store.put(name(2), inversion(2, 3 * 1000), FITTING)
    assert [entry.name for entry in (await store.list(10, ""))[0]] == [name(1)]


# --- damage -------------------------------------------------------------------------------------------------------


async def damage(url: str, store: InversionStore, at: int) -> None:
    """Turn one bit of the stored object."""
    objects = store._objects._store if url == "memory:///" else open_store(url)  # memory has no second door
    path = f"inversions/{name(1)}.safetensors"
    data = bytearray(await (await obstore.get_async(objects, path)).bytes_async())
    data[at] ^= 1
    await obstore.put_async(objects, path, bytes(data))


@pytest.mark.parametrize("at", [-1, 0, 20], ids=["latents", "length", "header"])
async def test_damage_is_found_and_removed(url: str, at: int, opener: Opener) -> None:
    store = await opener(url)
    await store.put(name(1), inversion(1), FITTING)
    await damage(url, store, at)
    with pytest.raises(StoreCorrupt, match=name(1)):
        await store.get(name(1))
    with pytest.raises(InversionExpired):
        await store.get(name(1))
    assert store.entries == 0
    await store.put(name(1), inversion(1), FITTING)
    assert np.array_equal((await store.get(name(1)))[0].arrays["x"], inversion(1).arrays["x"])


async def test_an_intact_file_of_another_inversion_is_no_answer(url: str, opener: Opener) -> None:
    store = await opener(url)
    await store.put(name(1), inversion(1), FITTING)
    objects = store._objects._store
    data = await (await obstore.get_async(objects, f"inversions/{name(1)}.safetensors")).bytes_async()
    await obstore.put_async(objects, f"inversions/{name(2)}.safetensors", bytes(data))
    for reading in (store.get, store.head, store.export):
        with pytest.raises((StoreCorrupt, InversionExpired), match=name(2)) as caught:
            await reading(name(2))
        assert isinstance(caught.value, StoreCorrupt) == (reading == store.get), "removed when it was found"
    assert (await store.get(name(1)))[1].name == name(1)


async def test_export_never_hands_out_damage(url: str, opener: Opener) -> None:
    store = await opener(url)
    await store.put(name(1), inversion(1), FITTING)
    await damage(url, store, -1)
    with pytest.raises(StoreCorrupt):
        await store.export(name(1))


async def test_a_damaged_header_is_replaced_by_a_put(url: str, opener: Opener) -> None:
    store = await opener(url)
    await store.put(name(1), inversion(1), FITTING)
    await damage(url, store, 20)
    await store.put(name(1), inversion(1), FITTING)
    assert (await store.get(name(1)))[1].fitting == FITTING


async def test_a_restart_removes_what_it_cannot_read(shared_url: str, opener: Opener) -> None:
    store = await opener(shared_url)
    await store.put(name(1), inversion(1), FITTING)
    await store.put(name(2), inversion(2), FITTING)
    await damage(shared_url, store, 20)
    again = await opener(shared_url)
    assert [entry.name for entry in (await again.list(10, ""))[0]] == [name(2)]


async def test_an_interrupted_upload_is_no_inversion(file_url: str, folder: Path, opener: Opener) -> None:
    await opener(file_url)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name(1)}.safetensors").write_bytes(b"")
    store = await opener(file_url)
    with pytest.raises(InversionExpired):
        await store.get(name(1))
    assert list(folder.iterdir()) == []


# --- listing ------------------------------------------------------------------------------------------------------


async def test_pages_are_newest_first_and_complete(url: str, opener: Opener, clock: Clock) -> None:
    store = await opener(url)
    for number in range(7):
        clock.ahead_s += 1
        await store.put(name(number), inversion(number), FITTING)
    pages, token = [], ""
    while True:
        page, token = await store.list(3, token)
        pages.append([int(entry.name, 16) for entry in page])
        if not token:
            break
    assert pages == [[6, 5, 4], [3, 2, 1], [0]]


async def test_pages_are_stable_while_entries_come_and_go(url: str, opener: Opener, clock: Clock) -> None:
    store = await opener(url)
    for number in range(6):
        clock.ahead_s += 1
        await store.put(name(number), inversion(number), FITTING)
    first, token = await store.list(2, "")
    clock.ahead_s += 1
    await store.put(name(99), inversion(99), FITTING)
    await store.delete(name(4))
    await store.put(name(2), replace(inversion(2), reconstruction_psnr_db=30.0), FITTING, replace=True)
    second, _ = await store.list(2, token)
    assert [int(entry.name, 16) for entry in first + second] == [5, 4, 3, 2]


async def test_entries_of_one_instant_are_all_listed(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "__call__", lambda self: 2e9)
    store = await opener("memory:///")
    for number in range(5):
        await store.put(name(number), inversion(number), FITTING)
    first, token = await store.list(2, "")
    rest, end = await store.list(10, token)
    assert sorted(int(entry.name, 16) for entry in first + rest) == [0, 1, 2, 3, 4]
    assert end == ""


async def test_page_size_zero_takes_fifty(opener: Opener) -> None:
    store = await opener("memory:///")
    for number in range(51):
        await store.put(name(number), inversion(number, values=3), FITTING)
    page, token = await store.list(0, "")
    assert (len(page), token != "") == (50, True)


@pytest.mark.parametrize("token", ["x", "ä", "bm9uc2Vuc2U=", "MjAyNiAw", "IA=="])
async def test_a_foreign_token_is_a_field_at_fault(token: str, opener: Opener) -> None:
    store = await opener("memory:///")
    with pytest.raises(FieldInvalid) as caught:
        await store.list(10, token)
    assert [violation.path for violation in caught.value.violations] == ["page_token"]


# --- many at once -------------------------------------------------------------------------------------------------


async def test_many_tasks_at_once_see_whole_inversions_only(url: str, opener: Opener) -> None:
    store = await opener(url, max_bytes=15_000)
    draw = random.Random(0)

    async def work() -> None:
        for _ in range(12):
            number = draw.randrange(6)
            act = draw.choice(["put", "replace", "get", "get", "delete", "list"])
            if act in ("put", "replace"):
                await store.put(name(number), inversion(number), FITTING, replace=act == "replace")
            elif act == "get":
                with suppress(InversionExpired):
                    got, _ = await store.get(name(number))
                    assert got.arrays["source"][0, 0] == number + 1
            elif act == "delete":
                await store.delete(name(number))
            else:
                await store.list(2, "")

    await asyncio.gather(*(work() for _ in range(8)))
    entries, _ = await store.list(100, "")
    assert store.total_bytes == sum(entry.size_bytes for entry in entries) <= 15_000
    for entry in entries:
        await store.get(entry.name)


async def test_the_gauges_follow_the_store(opener: Opener) -> None:
    metrics = Metrics()
    store = await opener("memory:///", metrics=metrics)
    gauge = partial(metrics.registry.get_sample_value, labels={})
    assert gauge("underpaint_inversion_store_entries") == 0
    entry = await store.put(name(1), inversion(1), FITTING)
    await store.get(name(1))
    assert gauge("underpaint_inversion_store_entries") == 1
    assert gauge("underpaint_inversion_store_bytes") == entry.size_bytes
    assert counted(metrics, "requests", result="hit") == 1


@pytest.mark.parametrize("module", ["torch", "grpc", "diffusers", "transformers"])
async def test_the_store_stays_light(module: str) -> None:
    code = f"import sys, underpaint_server.stores; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- out of reach -------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[InversionStore], Awaitable[object]]] = {
    "put": lambda store: store.put(name(2), inversion(2), FITTING),
    "get": lambda store: store.get(name(1)),
    "head": lambda store: store.head(name(1)),
    "export": lambda store: store.export(name(1)),
    "delete": lambda store: store.delete(name(1)),
    "look elsewhere": lambda store: store.get(name(3)),
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_place_out_of_reach_is_unavailable_until_it_is_back(
    call: str, file_url: str, folder: Path, opener: Opener
) -> None:
    store = await opener(file_url)
    await store.put(name(1), inversion(1), FITTING)
    away = folder.rename(folder.with_name("away"))
    folder.touch()  # a file where the folder was: every access fails, also for root
    with pytest.raises(StoreUnavailable) as caught:
        await CALLS[call](store)
    assert caught.value.retry_after_s
    assert str(folder) not in caught.value.message
    assert caught.value.__cause__ is not None
    folder.unlink()
    away.rename(folder)
    await store.get(name(1))


async def test_a_server_out_of_reach_is_unavailable_until_it_is_back(
    s3_url: str, opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)  # shows the same buckets as the other one
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT", f"http://{host}:{port}")
    store = await opener(s3_url)
    await store.put(name(1), inversion(1), FITTING)
    server.stop()
    calls: list[Callable[[InversionStore], Awaitable[object]]] = [*CALLS.values(), lambda store: store.list(0, "")]
    for call in calls:
        with pytest.raises(StoreUnavailable) as caught:
            await call(store)
        assert str(port) not in caught.value.message
    server = ThreadedMotoServer(host, port, verbose=False)
    server.start()
    await store.get(name(1))
    server.stop()


async def test_a_store_that_cannot_be_reached_does_not_open(
    s3_url: str, opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StoreUnavailable):
        await opener(s3_url)
