"""Learned directions end to end: real servers, the closed-form network, processes that die at the worst moment."""

import asyncio
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from e2e.harness import disc, engine_of, eventually, idle, scrape, stubs
from google.longrunning import operations_pb2
from support.front import refused
from support.waiting import PATIENCE_S
from underpaint import (
    AsyncClient,
    AsyncLearning,
    Direction,
    Disentangled,
    Edict,
    Generated,
    GradientLearning,
    Phase,
    Progress,
    SearchLearning,
    errors,
)
from underpaint_server.local_server import LocalServer

STEPS = 60
"""So many that learning is not done while a test looks at its progress and ends a process."""
WAIT = signal.SIGCONT
"""Changes nothing: the server has been told to stop already."""
LONG = 200
"""Optimiser steps that outlast every test here."""


def server(store: Path, **settings: Any) -> LocalServer:
    return LocalServer(models="toy=toy:", store_url=store.as_uri(), **settings)


def impatient(store: Path, **settings: Any) -> LocalServer:
    """A server whose claims are void after five seconds: one that others go on from. Those have claims of the usual
    time, which a busy machine renews early enough."""
    return server(store, claim_ttl_s=5, **settings)


async def learn(client: AsyncClient, name: str = "", steps: int = STEPS, **more: Any) -> AsyncLearning:
    method = GradientLearning(optimization_steps=steps, learning_rate=0.02)
    return await client.learn("a circle", "a square", [disc(), 7], name=name, method=method, steps=20, seed=5, **more)


async def reached(learning: AsyncLearning, step: int) -> int:
    """The step it has come to, once that is so far."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            now = await learning.status()
            assert not now.done, now
            assert now.progress is not None
            if now.progress.step >= step:
                return now.progress.step
            await asyncio.sleep(0.01)


def said(server: LocalServer, event: str) -> list[dict[str, Any]]:
    return [line for line in server.events() if line["event"] == event]


def iterations(server: LocalServer, event: str = "operation kept") -> list[int]:
    return [line["iteration"] for line in said(server, event)]


def parts(store: Path, learning: AsyncLearning) -> set[str]:
    """Kinds of objects that the store has of an operation."""
    return {path.name.partition("-")[0] for path in (store / learning.name).iterdir()}


def stored(store: Path, learning: AsyncLearning) -> int:
    """The step of the newest state that the store has of an operation."""
    return max(int(path.name.partition("-")[2]) for path in (store / learning.name).glob("state-*"))


def same(one: Direction, other: Direction) -> bool:
    return (one.weights, one.losses) == (other.weights, other.losses) and len(set(one.weights)) > 2


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Direction:
    """What learning gives that nobody disturbs."""

    async def undisturbed(target: str) -> Direction:
        async with AsyncClient(target) as client:
            return await (await learn(client)).result()

    with server(tmp_path_factory.mktemp("reference")) as one:
        return asyncio.run(undisturbed(one.target))


async def test_a_direction_is_learned_used_and_carried_to_another_server(tmp_path: Path) -> None:
    seen: list[Progress] = []
    with server(tmp_path / "one") as one, server(tmp_path / "two") as two:
        async with AsyncClient(one.target) as client, AsyncClient(two.target) as other:
            learning = await learn(client, "square", 12, display_name="Squares")
            made = await learning.result(progress=seen.append)
            assert (made.name, made.display_name, made.steps, made.example_count) == (
                "directions/square", "Squares", 20, 2,
            )  # fmt: skip
            assert len(made.losses) == 13
            assert min(made.losses) < made.losses[0]
            assert made == await client.get_direction("square")
            assert [each.name for each in [each async for each in client.list_directions()]] == [made.name]
            fractions = [now.fraction for now in seen]
            assert fractions == sorted(fractions)
            assert (seen[-1].phase, seen[-1].step, seen[-1].total_steps, seen[-1].fraction) == (
                Phase.OPTIMIZING, 12, 12, 1.0,
            )  # fmt: skip
            assert seen[-1].loss == made.losses[-1]

            edited = await client.edit(disc(), "", Disentangled(direction=made))
            plain = await client.edit(disc(), "", Disentangled(direction=made, scale=0), seed=edited.resolved.seed)
            assert edited.image_bytes != plain.image_bytes
            file = await client.export_direction(made, tmp_path / "square.safetensors")
            await client.delete_direction(made, etag=made.etag)
            assert (await client.repeat(edited.resolved)).image_bytes == edited.image_bytes
            with pytest.raises(errors.DirectionNotFound):
                await client.edit(disc(), "", Disentangled(direction="square"))

            there = await other.import_direction(tmp_path / "square.safetensors", name="square")
            assert there == made
            assert await other.export_direction("square") == file
            again = await other.edit(disc(), "", Disentangled(direction=there), seed=edited.resolved.seed)
            assert again.image_bytes == edited.image_bytes
        now = await idle(one)
        assert now.by("underpaint_operations", "state") == {"running": 0, "waiting": 0, "done": 1}


async def test_a_search_learns_without_gradients(tmp_path: Path) -> None:
    with server(tmp_path) as one:
        async with AsyncClient(one.target) as client:
            method = SearchLearning(switch_steps=[2, 5], late_weights=[0.25, 0])
            learning = await client.learn("a circle", "a square", [3], method=method, steps=10)
            made = await learning.result()
    candidates = [(1.0,) * n + (w,) * (10 - n) for n in (2, 5) for w in (0.25, 0.0)]
    assert made.weights == candidates[made.losses.index(min(made.losses))]
    assert (made.method, len(made.losses)) == ("search", 4)


async def test_an_engine_that_is_killed_costs_a_few_steps_and_changes_no_bit(
    tmp_path: Path, reference: Direction
) -> None:
    with server(tmp_path) as one:
        async with AsyncClient(one.target) as client:
            learning = await learn(client)
            await reached(learning, 3)
            engine_of(one).kill()
            made = await learning.result()
        assert iterations(one, "operation taken") == [0]
        assert iterations(one) == list(range(2, STEPS, 2))
        assert scrape(one).sum("underpaint_engine_restarts_total") == 1
    assert same(made, reference)


async def test_a_server_that_is_killed_is_gone_on_from_by_the_next_one(tmp_path: Path, reference: Direction) -> None:
    first = impatient(tmp_path)
    first.__enter__()
    async with AsyncClient(first.target) as client:
        learning = await learn(client, "square")
        await reached(learning, 7)
    first.stop(signal.SIGKILL)
    kept = stored(tmp_path, learning)
    assert kept >= 6
    with server(tmp_path) as second:
        async with AsyncClient(second.target) as client:
            after = await client.attach(learning.name)
            before = (await after.status()).progress
            assert before is not None
            assert before.step >= kept
            made = await after.result()
            assert (await client.get_direction("square")) == made
        assert iterations(second, "operation taken")[0] == kept
        assert iterations(second)[0] == kept + 2
        await eventually(lambda: parts(tmp_path, learning) == {"request", "done"})
    assert same(made, reference)


async def test_a_server_that_stops_passes_on_what_it_learns(tmp_path: Path, reference: Direction) -> None:
    with server(tmp_path) as first:
        async with AsyncClient(first.target) as client:
            learning = await learn(client)
            await reached(learning, 4)
            psutil.Process(first.pid).send_signal(signal.SIGTERM)
            first.wait_for("stopped")
            assert first.stop(WAIT) == 0
        assert len(said(first, "operation released")) == 1
        kept = iterations(first)
    assert "done" not in parts(tmp_path, learning)
    with server(tmp_path) as second:  # whose claims last half a minute, but this one was released
        async with AsyncClient(second.target) as client:
            made = await (await client.attach(learning.name)).result()
        assert iterations(second, "operation taken") == [kept[-1]]
    assert same(made, reference)


async def test_work_that_outlasts_the_drain_is_given_up_and_not_lost(tmp_path: Path) -> None:
    with server(tmp_path, drain_s=0.1, learn_checkpoint_every=LONG) as first:
        async with AsyncClient(first.target) as client:
            learning = await learn(client, steps=LONG)
            await reached(learning, 2)
            psutil.Process(first.pid).send_signal(signal.SIGTERM)
            first.wait_for("stopped")
            assert first.stop(WAIT) == 0
        (released,) = said(first, "operation released")
        assert released["reason"] == "DRAINING"
    assert parts(tmp_path, learning) == {"request", "examples", "claim"}


async def test_two_servers_of_one_store_run_an_operation_once(tmp_path: Path, reference: Direction) -> None:
    # Claims last long enough for the busiest machine.
    with server(tmp_path, claim_ttl_s=60) as one, server(tmp_path, claim_ttl_s=60) as two:
        async with AsyncClient(one.target) as client, AsyncClient(two.target) as other:
            begun = [await learn(each, steps=STEPS) for each in (client, client, other, other)]
            with pytest.raises(errors.OperationRunning):
                await begun[-1].forget()
            # Each is followed on the server that it was not given to.
            crossed = [await (other if k < 2 else client).attach(each.name) for k, each in enumerate(begun)]
            made = await asyncio.gather(*(each.result() for each in crossed))
        taken = [line["operation"] for each in (one, two) for line in said(each, "operation taken")]
        assert sorted(taken) == sorted(each.name.removeprefix("operations/") for each in begun)
        assert all(said(each, "operation taken") for each in (one, two))
        assert not said(one, "operation lost") + said(two, "operation lost")
    assert all(same(each, reference) for each in made)


async def test_an_owner_that_was_frozen_wakes_up_and_does_no_harm(tmp_path: Path, reference: Direction) -> None:
    with impatient(tmp_path) as one:
        async with AsyncClient(one.target) as client:
            learning = await learn(client, "square")
            await reached(learning, 6)
            frozen = [psutil.Process(one.pid), engine_of(one)]
            for process in frozen:
                process.suspend()
        with server(tmp_path) as two:
            async with AsyncClient(two.target) as client:
                other = await client.attach(learning.name)
                await reached(other, 8)
                for process in frozen:
                    process.resume()
                made = await other.result()
                one.wait_for("operation lost")
                assert await client.get_direction("square") == made
            assert iterations(two, "operation taken")[0] >= 4
            assert not said(one, "operation ended")
            await eventually(lambda: parts(tmp_path, learning) == {"request", "done"})
    assert same(made, reference)


async def _cancelled(learning: AsyncLearning, store: Path, running: LocalServer) -> None:
    ended = await learning.wait()
    assert ended.done
    assert isinstance(ended.error, errors.Cancelled)
    with pytest.raises(errors.Cancelled):
        await learning.result()
    await eventually(lambda: scrape(running).sum("underpaint_num_requests_running") == 0)
    await eventually(lambda: parts(store, learning) == {"request", "done"})


async def test_a_cancel_ends_within_a_step_and_nothing_is_kept(tmp_path: Path) -> None:
    with server(tmp_path, learn_checkpoint_every=50) as one:
        async with AsyncClient(one.target) as client:
            learning = await learn(client, "square", LONG)
            step = await reached(learning, 60)
            await learning.cancel()
            await _cancelled(learning, tmp_path, one)
            passes = await idle(one)
            assert passes.sum("underpaint_cancellations_total", method="learn", stage="running") == 1
            # What was asked for before the cancel came is all there is: the passes of an edit hold no row of it.
            done = passes.sum("underpaint_network_rows_total", method="learn")
            await client.edit(disc(), "a square", Edict())
            assert scrape(one).sum("underpaint_network_rows_total", method="learn") == done
            assert step < LONG
            assert [each async for each in client.list_directions()] == []
            await learning.cancel()  # again, and nothing happens
            await learning.forget()
            with pytest.raises(errors.OperationNotFound):
                await learning.status()
            made = await (await learn(client, "square", 2)).result()  # the name was never taken
            assert made.name == "directions/square"


async def test_a_cancel_reaches_an_operation_on_another_server(tmp_path: Path) -> None:
    with server(tmp_path) as one, server(tmp_path, max_learning=0) as two:
        async with AsyncClient(one.target) as client, AsyncClient(two.target) as other:
            learning = await learn(client, steps=LONG)
            await reached(learning, 6)
            await (await other.attach(learning.name)).cancel()
            await _cancelled(learning, tmp_path, one)
            assert said(one, "operation lost")
            assert not said(two, "operation taken")


async def test_waiting_respects_its_timeout_and_the_deadline(tmp_path: Path) -> None:
    with server(tmp_path, max_learning=0) as one:  # so that it never ends
        async with AsyncClient(one.target) as client, stubs(one) as wire:
            learning = await learn(client)
            briefly = operations_pb2.WaitOperationRequest(name=learning.name, timeout={"nanos": 300_000_000})
            assert not (await wire.operations.WaitOperation(briefly)).done
            assert not (await learning.wait(timeout=0.3)).done
            request = operations_pb2.WaitOperationRequest(name=learning.name)
            for _ in range(20):  # the answer comes shortly before the deadline: on a busy machine now and then too late
                call = wire.operations.WaitOperation(request, timeout=1)
                answer: Any = (await asyncio.gather(call, return_exceptions=True))[0]
                if not isinstance(answer, grpc.aio.AioRpcError):
                    break
                assert answer.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert not answer.done


async def test_a_direction_of_other_weights_is_refused(tmp_path: Path) -> None:
    with LocalServer(models="toy=toy:,other=toy:pinned", store_url=tmp_path.as_uri()) as one:
        async with AsyncClient(one.target) as client:
            made = await (await learn(client, "square", 2)).result()
            with pytest.raises(errors.DirectionModelMismatch) as caught:
                await client.edit(disc(), "", Disentangled(direction=made), model="other")
            assert caught.value.reason == "DIRECTION_MODEL_MISMATCH"
            with pytest.raises(errors.DirectionStepsMismatch) as other:
                await client.edit(Generated("", seed=1, steps=7), "", Disentangled(direction=made))
            assert other.value.metadata["steps"] == "20"


MIXED: dict[str, Callable[[], dict[str, Any]]] = {
    "switch": lambda: {"method": Disentangled(switch_step=8)},
    "plms, scaled": lambda: {"method": Disentangled(switch_step=3, scale=1.7, steps=9, sampler="plms")},
    "given": lambda: {"method": Disentangled(weights=[1, 0.7, 0.31, -0.123456789, 0], scale=0.9)},
    "another guidance": lambda: {"method": Disentangled(switch_step=2), "guidance_scale": 2.5},
}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("source", ["photo", "stored", "generated"])
async def test_a_mixed_edit_repeats_from_its_resolved_request(toy: LocalServer, kind: str, source: str) -> None:
    async with AsyncClient(toy.target) as client:
        given: Any = disc(size=(32, 32))
        work = MIXED[kind]()
        said_of: dict[str, Any] = {"source_prompt": "a circle"}
        if source == "generated":  # which has steps and prompt of its own
            given = Generated("a circle", seed=4, steps=work["method"].steps)
            work["method"], said_of = replace(work["method"], steps=None), {}
        if source == "stored":
            given, said_of = await client.invert(given, source_prompt="a circle", steps=6), {}
        first = await client.edit(given, "a square", **work, **said_of)
        assert first.resolved.message.disentangled.WhichOneof("weights") == "given"
        assert (await client.repeat(first.resolved)).image_bytes == first.image_bytes
        if source == "stored":  # the inversion said what the picture shows
            assert first.resolved.message.disentangled.source_prompt == "a circle"
            other = await client.edit(given, "a square", **work, source_prompt="a tree", seed=first.resolved.seed)
            assert other.image_bytes != first.image_bytes


async def test_weights_of_one_bring_the_picture_back(toy: LocalServer) -> None:
    async with AsyncClient(toy.target) as client:
        photo = disc(size=(32, 32))
        kept = await client.edit(photo, "a square", Disentangled(switch_step=20), source_prompt="a circle", seed=1)
        nothing = await client.edit(
            photo, "a tree", Disentangled(switch_step=3, scale=0), source_prompt="a circle", seed=1
        )
        inverted = await client.edit(photo, "a circle", Edict(), source_prompt="a circle")
        assert kept.image_bytes == nothing.image_bytes == inverted.image_bytes


async def test_operations_are_listed_newest_first_page_by_page(tmp_path: Path) -> None:
    with impatient(tmp_path, max_learning=0) as one:
        async with AsyncClient(one.target) as client, stubs(one) as wire:
            begun = [(await learn(client, f"d{k}")).name for k in range(5)]
            await (await client.attach(begun[1])).cancel()
            for done, wanted in ((None, begun), (False, [n for n in begun if n != begun[1]]), (True, [begun[1]])):
                found = [each.name async for each in client.list_operations(done=done, page_size=2)]
                assert found == wanted[::-1]
            for wrong in ({"filter": "name=x"}, {"name": "operations/x"}, {"page_size": 1001}, {"page_token": "?"}):
                told = await refused(wire.operations.ListOperations(operations_pb2.ListOperationsRequest(**wrong)))
                assert (told.reason, told.paths) == ("FIELD_INVALID", list(wrong))
            now = await eventually(lambda: scrape(one).sum("underpaint_operations", state="waiting") == 4)
            assert now


async def test_a_finished_operation_is_forgotten_after_its_time(tmp_path: Path) -> None:
    with impatient(tmp_path, operation_ttl_s=0.5) as one:
        async with AsyncClient(one.target) as client:
            learning = await learn(client, "square", 1)
            await eventually(lambda: said(one, "operation ended"))
            await eventually(lambda: not (tmp_path / learning.name / "request").exists())
            assert (await client.get_direction("square")).steps == 20
