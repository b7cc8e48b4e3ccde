"""``python -m benchmarks peers``: its traces, what it counts from, that contenders do the same work, and its tables.

The measurements themselves are not run here.
"""

import asyncio
import selectors
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from underpaint_server.backends import load as load_backend
from underpaint_server.settings import Settings

from benchmarks import peers
from benchmarks.peers import batchers, charts, eight, load, openloop, passes, targets, while_learning
from benchmarks.peers.edits import GUIDANCE, Edit, make, pixels, worst_psnr_db
from benchmarks.peers.eight import Contender, Outcome
from benchmarks.peers.load import Point, Sweep
from benchmarks.peers.lockstep import Lockstep
from benchmarks.peers.loops import Loops
from benchmarks.peers.networks import eager
from benchmarks.peers.official import OfficialEdict
from benchmarks.peers.openloop import Answer, Arrival
from benchmarks.peers.passes import Measured
from benchmarks.peers.setup import FULL, MODEL_ID, QUICK

T = TypeVar("T")
LOOP_METHODS = ("sdedit", "ddim", "diffedit", "edict")
SAME_DB = 60.0
"""Smallest PSNR of pictures that differ by the rounding of float32 alone."""


class FakeTime(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when it waits."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now


class _Selector(selectors.SelectSelector):
    def __init__(self, loop: FakeTime) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._loop.now += timeout or 0.0
        return super().select(0)


def in_fake_time(main: Coroutine[Any, Any, T]) -> T:
    loop = FakeTime()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


def arrivals(*times_s: float) -> list[Arrival]:
    return [Arrival(at_s, make("sdedit", k, 4)) for k, at_s in enumerate(times_s)]


# --- the open loop ----------------------------------------------------------------------------------------------


def test_a_seed_gives_one_trace_and_another_seed_another() -> None:
    one, again, other = (openloop.requests(seed, 400, (20, 30)) for seed in (1, 1, 2))
    assert one == again
    assert [edit.kind for edit in one] != [edit.kind for edit in other]
    shares = Counter(edit.method for edit in one)
    assert shares.keys() == openloop.MIX.keys()
    assert all(abs(shares[method] / 400 - share) < 0.08 for method, share in openloop.MIX.items())
    assert {edit.steps for edit in one} == {20, 30}
    assert {edit.strength for edit in one} == set(openloop.STRENGTHS)
    assert len({edit.photo for edit in one}) == 400, "an equal photo would find the inversion of another request"


def test_another_rate_stretches_the_same_trace() -> None:
    edits = openloop.requests(1, 300, (20,))
    slow, fast = (openloop.poisson(1, rate, edits, 100.0) for rate in (1.0, 2.0))
    assert openloop.poisson(1, 1.0, edits, 100.0) == slow
    assert 60 < len(slow) < 140 < len(fast)
    for one, other in zip(slow, fast, strict=False):
        assert one.edit is other.edit
        assert one.at_s == pytest.approx(2 * other.at_s)
    assert slow[-1].at_s < 100


def test_latency_counts_from_the_intended_time_while_the_server_is_slow() -> None:
    """Requests come every second, and the server needs two for each, one after another."""
    free = asyncio.Lock()

    async def serve(_: Edit) -> None:
        async with free:
            await asyncio.sleep(2)

    answers = in_fake_time(openloop.play(arrivals(0, 1, 2, 3), serve))
    assert [answer.sent_s for answer in answers] == pytest.approx([0, 1, 2, 3]), "sent without waiting for answers"
    assert [answer.latency_s for answer in answers] == pytest.approx([2, 3, 4, 5])
    assert [answer.lag_s for answer in answers] == pytest.approx([0, 0, 0, 0])


def test_a_generator_that_was_late_says_so_and_the_latency_has_it() -> None:
    async def blocks(edit: Edit) -> None:
        if edit.seed == 0:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, FakeTime)
            loop.now += 5  # as if this process had got no time of a core

    answers = in_fake_time(openloop.play(arrivals(0, 1, 6), blocks))
    assert [answer.sent_s for answer in answers] == pytest.approx([0, 5, 6])
    assert [answer.lag_s for answer in answers] == pytest.approx([0, 4, 0])
    assert [answer.latency_s for answer in answers] == pytest.approx([5, 4, 0])


def test_an_error_is_an_answer_and_the_others_go_on() -> None:
    async def fails(edit: Edit) -> None:
        await asyncio.sleep(1)
        if edit.seed == 1:
            raise OSError("HTTP 500")

    answers = in_fake_time(openloop.play(arrivals(0, 1, 2), fails))
    assert [answer.error for answer in answers] == ["", "OSError: HTTP 500", ""]


def test_statistics_leave_out_the_warm_up_and_count_errors_as_late() -> None:
    trace = arrivals(*(0.1 * k for k in range(100)))
    answers = [
        Answer(arrival, arrival.at_s, arrival.at_s + (50.0 if k < 10 else 1.0 if k < 55 else 4.0))
        for k, arrival in enumerate(trace)
    ]
    answers[10] = Answer(trace[10], trace[10].at_s + 0.5, trace[10].at_s + 1.0, "OSError: HTTP 500")
    found = openloop.summary(answers, 10.0, lambda edit: 1.0)
    assert found.count == 90, "the first tenth of the time is warm-up"
    assert found.p50_s == pytest.approx(2.5)
    assert (found.p95_s, found.p99_s) == pytest.approx((4.0, 4.0))
    assert found.failed == 1
    assert found.in_time == pytest.approx(44 / 90)
    assert found.goodput == pytest.approx(44 / 9)
    assert found.lag_p99_s == pytest.approx(0.055)


def test_statistics_of_no_request_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="measure for longer"):
        openloop.summary([], 10.0, lambda edit: 1.0)


def test_first_come_first_served_waits_for_what_is_in_front() -> None:
    assert openloop.first_come_first_served([0, 1, 20], 2.0, 10.0) == pytest.approx([12, 13, 2])


# --- the same work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", GUIDANCE)
def test_an_edit_is_the_same_after_json(method: str) -> None:
    edit = make(method, 70_000, 4)
    assert Edit.from_json(edit.to_json()) == edit
    assert (pixels(edit.photo)[0, 0] == [1, 17, 112]).all(), "the number, as the colour of a pixel"


def test_a_batch_of_requests_gives_what_each_gives_alone_and_counts_its_rows() -> None:
    toy = load_backend("toy:", MODEL_ID, Settings())
    edits = [make(method, k, 4) for k, method in enumerate(GUIDANCE)]
    batcher = Lockstep(toy, 16)
    together = batcher.run([edit.job() for edit in edits])
    assert batcher.work.rows == sum(edit.rows() for edit in edits)
    assert 0 < batcher.work.passes < batcher.work.rows / 2
    for edit, result in zip(edits, together, strict=True):
        (alone,) = Lockstep(toy, 16).run([edit.job()])
        assert (alone.pixels == result.pixels).all(), edit.method


@pytest.fixture(scope="module")
def reference() -> Iterator[Lockstep]:
    threads = torch.get_num_threads()
    yield Lockstep(load_backend("torch:", MODEL_ID, Settings(dtype="float32", exact_batching="pinned")), 16)
    torch.set_num_threads(threads)


@pytest.mark.xdist_group("peers")
@pytest.mark.parametrize("method", LOOP_METHODS)
def test_a_loop_of_diffusers_makes_our_pictures(method: str, reference: Lockstep) -> None:
    edits = [make(method, number, 3) for number in (1, 2)]
    ours = [result.pixels for result in reference.run([edit.job() for edit in edits])]
    assert worst_psnr_db(Loops(eager(torch.float32)).run(edits), ours) > SAME_DB


@pytest.mark.xdist_group("peers")
def test_edict_in_float64_makes_our_pictures(reference: Lockstep) -> None:
    edit = make("edict", 1, 3)
    (ours,) = reference.run([edit.job()])
    assert worst_psnr_db(OfficialEdict().run([edit]), [ours.pixels]) > SAME_DB


def test_a_contender_with_other_pictures_is_not_timed() -> None:
    truth = [np.full((8, 8, 3), 100, np.uint8)] * 2
    contender = Contender("another", "at once", "half", lambda _: [])
    assert eight._refuse(contender, "work", truth, truth, eight.FLOOR_DB) == 99.0
    with pytest.raises(SystemExit, match=r"another, at once, work: a picture has 8\.1 dB"):
        eight._refuse(contender, "work", [truth[0], truth[1] + 100], truth, eight.FLOOR_DB)


def test_our_server_with_other_bytes_at_once_is_no_result() -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    made = {("work", "our server, one by one"): [picture], ("work", "our server, at once"): [picture + 1]}
    with pytest.raises(SystemExit, match="other bytes at once than alone"):
        eight._refuse_unequal(made)


async def test_an_answer_over_http_is_json_and_another_status_is_an_error() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        body = await reader.readexactly(int(head.lower().split("content-length: ")[1].split()[0]))
        status = b"200 OK" if b"good" in body else b"500 Internal Server Error"
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert await batchers._post(port, "/", {"word": "good"}) == {"word": "good"}
        with pytest.raises(OSError, match="500"):
            await batchers._post(port, "/", {"word": "bad"})


# --- tables -----------------------------------------------------------------------------------------------------


def outcome(**seconds: float) -> Outcome:
    names = {"ours": "our server, at once", "alone": "our server, one by one", "peer": "diffusers, float32, one by one"}
    return Outcome({names[key]: [value, value] for key, value in seconds.items()})


def swept() -> Sweep:
    trace = arrivals(*range(1, 10))
    fast, slow = (
        openloop.summary([Answer(a, a.at_s, a.at_s + s) for a in trace], 10.0, lambda edit: 1.0) for s in (1.0, 4.0)
    )
    points = [
        Point(factor, name, result, 10, 8.0, 0.01)
        for factor in (0.6, 0.8)
        for name, result in (("our server", fast), ("LitServe", slow))
    ]
    return Sweep(points, {"our server": 100.0, "LitServe": 80.0}, 50.0, True, {("sdedit", 4, 0.5): 1.0})


def test_ratios_are_over_our_server_at_once_and_a_single_edit_over_it_alone() -> None:
    outcomes = {"four methods": outcome(ours=2.0, alone=8.0, peer=6.0), "one EDICT": outcome(alone=2.0, peer=5.0)}
    _, ratios, _ = eight.tables(outcomes)
    assert {label: cells for label, *cells in ratios.rows} == {
        "our server, at once": ["1.00 (1.00 to 1.00)", ""],
        "our server, one by one": ["4.00 (4.00 to 4.00)", "1.00 (1.00 to 1.00)"],
        "diffusers, float32, one by one": ["3.00 (3.00 to 3.00)", "2.50 (2.50 to 2.50)"],
    }
    assert peers._closed_findings(outcomes, None) == [
        "Our server, eight edits at once, over diffusers in float32 one by one: four methods 0.33 (0.33 to 0.33).",
        "A single EDICT takes our server 2.00 (2.00 to 2.00) s: 0.40 (0.40 to 0.40) of diffusers, float32, one by one.",
    ]


def test_targets_are_judged_by_the_worst_workload() -> None:
    outcomes = {
        "8 x SDEdit": outcome(ours=1.0, alone=8.0, peer=10.0),
        "four methods": outcome(ours=2.0, alone=8.0, peer=6.0),
        "one EDICT": outcome(alone=2.0, peer=5.0),
    }
    alone = Measured({passes.TORCH: {8: [20.0, 20.0]}}, {})
    table = targets.table(outcomes, swept(), alone, 18.0)
    assert [(cells[0].partition(",")[0], *cells[2:]) for cells in table.rows] == [
        ("network rows/s", "100", "no"),
        ("the same over the torch backend's best pass", "5.00", "yes"),
        ("eight edits at once over diffusers", "0.33", "no"),
        ("p95 of LitServe over ours at load 0.8", "4.00", "yes"),
        ("first come", "18.00", "yes"),
    ]
    assert "worst: four methods" in table.rows[2][0]


def test_the_open_loop_says_what_is_compared() -> None:
    found = swept()
    assert found.capacity == 2.0
    table = load.table(found)
    assert [row[:2] for row in table.rows[:2]] == [("0.6", "our server"), ("0.6", "LitServe")]
    assert "equal to the last bit" in table.notes[0]
    alone = Measured({"the server's network (float32)": {8: [125.0]}}, {"float32": 1.0})
    saturated, tails, shares = peers._open_findings(found, alone)
    assert "100 network rows/s with 10 % content injections among the requests, 80 %" in saturated
    assert (
        "LitServe's latency over our server's, with the same network and trace: 4.00 at load 0.6; 4.00 at load 0.8"
        in tails
    )
    assert shares.endswith("at rising load: our server 100 %, 100 %; LitServe 0 %, 0 %.")
    assert load.plain(found)["capacity"] == 2.0


def test_the_gain_of_short_edits_is_over_first_come_first_served() -> None:
    found = while_learning.Outcome(10.0, 10.0, 50, 0.1, 0.5, 9.0, 0.4)
    assert found.gain == 18.0
    assert "40 % of its pace" in while_learning.table(found).notes[0]


@pytest.mark.parametrize("scale", [QUICK, FULL])
def test_every_scale_can_say_what_it_does(scale: Any) -> None:
    assert f"{scale.steps} steps, strength 0.8" in peers._about(scale, None)


@pytest.mark.parametrize("logarithmic", [False, True])
def test_charts_are_drawn_of_one_value_and_of_many(logarithmic: bool) -> None:
    one = charts.lines("one", "x", {"a": [(1, 3.0)]}, logarithmic=logarithmic)
    many = charts.lines("many", "x", {"a": [(1, 0.03), (2, 700.0)], "b": [(2, 5.0)]}, logarithmic=logarithmic)
    grouped = charts.bars("bars", {"x": {"a": 1.0, "b": 2.0}, "y": {"a": 3.0}}, logarithmic=logarithmic)
    paper = charts.sheet([one, many, grouped])
    assert paper.size == (2 * one.width, 2 * one.height)
    for chart in (one, many, grouped):
        assert len(chart.getcolors(1 << 20) or ()) > 10, "it has lines, text and grid"
