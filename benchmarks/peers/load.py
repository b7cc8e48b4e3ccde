"""The open loop at several load factors: our server and the request-level batchers, with the same traces."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Protocol

from rich.progress import Progress
from underpaint import AsyncClient
from underpaint_server.local_server import LocalServer

from benchmarks import served
from benchmarks.peers import openloop
from benchmarks.peers.batchers import Batcher
from benchmarks.peers.edits import GUIDANCE, Edit, make, pixels, worst_psnr_db
from benchmarks.peers.lockstep import Work
from benchmarks.peers.openloop import Summary
from benchmarks.peers.setup import AT_ONCE, Scale
from benchmarks.report import Table, console

OURS = "our server"
SEED = 1
SAME_DB = 45.0
"""Smallest PSNR between the pictures of two servers that run the same network."""
_SAMPLE_S = 0.1
_CHANGES = 4
_TIMEOUT_S = 900.0
Kind = tuple[str, int, float]


class System(Protocol):
    """A server that is sent edits."""

    name: str

    async def edit(self, edit: Edit) -> bytes:
        """The edited picture, encoded."""
        ...

    async def work(self) -> Work:
        """Network passes and rows since its start."""
        ...

    async def forget(self) -> None:
        """Delete what it keeps of earlier edits."""
        ...


class OurServer:
    """Our server, through its own client."""

    name = OURS

    def __init__(self, server: LocalServer, client: AsyncClient) -> None:
        self._server, self.client = server, client

    async def edit(self, edit: Edit) -> bytes:
        """See :class:`System`."""
        return (await self.client.edit(**edit.call())).image_bytes

    async def work(self) -> Work:
        """See :class:`System`."""
        read = await asyncio.to_thread(served.Counters.read, self._server)
        return Work(round(read.passes), round(read.rows), round(read.padding))

    async def forget(self) -> None:
        """See :class:`System`."""
        names = [inversion async for inversion in self.client.list_inversions(page_size=100)]
        for inversion in names:
            await self.client.delete_inversion(inversion, allow_missing=True)


class Other:
    """A request-level batcher."""

    def __init__(self, batcher: Batcher) -> None:
        self.name, self.edit, self._batcher = batcher.name, batcher.edit, batcher

    async def work(self) -> Work:
        """See :class:`System`; as of its last answer."""
        return self._batcher.work

    async def forget(self) -> None:
        """See :class:`System`; it keeps nothing."""


@dataclass(frozen=True, slots=True)
class Point:
    """One server at one load factor."""

    factor: float
    """Offered load over our server's capacity."""
    system: str
    summary: Summary
    passes: int
    rows_per_pass: float
    padding_share: float
    """Share of padding among all rows computed, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """All points."""

    points: list[Point]
    rows_per_s: Mapping[str, float]
    """Server -> saturated network rows per second."""
    rows_per_edit: float
    """Mean network rows of a request of the trace."""
    equal_bytes: bool
    """Whether all servers gave the same pictures to the last bit."""
    alone_s: Mapping[Kind, float]
    """Kind of edit -> its latency alone on our server."""

    @property
    def capacity(self) -> float:
        """Edits a second that our server can do."""
        return self.rows_per_s[OURS] / self.rows_per_edit

    def point(self, system: str, factor: float) -> Point:
        """One point."""
        return next(point for point in self.points if (point.system, point.factor) == (system, factor))


async def sweep(scale: Scale, server: LocalServer, batchers: Sequence[Batcher]) -> Sweep:
    """Check that all servers give the same pictures, find the capacities, then play the traces."""
    async with AsyncClient(server.target, timeout=_TIMEOUT_S) as client:
        systems: list[System] = [OurServer(server, client), *(Other(batcher) for batcher in batchers)]
        edits = openloop.requests(SEED, 5000, scale.trace_steps)
        equal = await _same_pictures(systems, scale)
        rows_per_edit = mean(edit.rows() for edit in edits[:500])
        measured: dict[str, list[float]] = {system.name: [] for system in systems}
        for _ in range(scale.capacity_rounds):
            for system in systems:
                measured[system.name].append(await _saturated(system, edits, scale.capacity_s))
        rates = {name: median(found) for name, found in measured.items()}
        alone_s = await _alone(systems[0], edits, rounds=1 if scale.rounds == 1 else 2)
        capacity = rates[OURS] / rows_per_edit
        listed = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        console.print(f"capacity {capacity:.2f} edits/s; saturated rows/s: {listed}")
        points = [
            await _point(system, factor, capacity, edits, scale, alone_s)
            for factor in scale.factors
            for system in systems
        ]
    return Sweep(points, rates, rows_per_edit, equal, alone_s)


async def _same_pictures(systems: Sequence[System], scale: Scale) -> bool:
    """Whether the pictures have equal bits; ends the benchmark where they are not even near each other."""
    edits = [make(method, 7000 + k, scale.check_steps) for k, method in enumerate((*GUIDANCE, *GUIDANCE))]
    made = [[pixels(picture) for picture in await asyncio.gather(*map(system.edit, edits))] for system in systems]
    equal = True
    for system, pictures in zip(systems, made, strict=True):
        worst = worst_psnr_db(pictures, made[0])
        equal = equal and all((one == other).all() for one, other in zip(pictures, made[0], strict=True))
        if worst < SAME_DB:
            raise SystemExit(
                f"{system.name} gave a picture with {worst:.1f} dB against our server's, so nothing is compared"
            )
    return equal


async def _saturated(system: System, edits: Sequence[Edit], seconds: float) -> float:
    """Network rows per second while twice as many requests wait as a batcher takes at once.

    Counters of a batcher change only when a batch ends, so the rate is taken between two changes, and the measurement
    goes on beyond ``seconds`` until there are :data:`_CHANGES`.
    """
    await system.forget()
    waiting = iter(edits)
    enough = asyncio.Event()

    async def ask() -> None:
        while not enough.is_set():
            await system.edit(next(waiting))

    async def watch() -> float:
        began, changes = time.perf_counter(), [((await system.work()).rows, 0.0)]
        while len(changes) < _CHANGES or changes[-1][1] < seconds:
            await asyncio.sleep(_SAMPLE_S)
            rows = (await system.work()).rows
            if rows != changes[-1][0]:
                changes.append((rows, time.perf_counter() - began))
        enough.set()
        (first, first_s), (last, last_s) = changes[1], changes[-1]
        return (last - first) / (last_s - first_s)

    with Progress(console=console) as progress:
        progress.add_task(f"capacity: {system.name}", total=None)
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(ask() for _ in range(2 * AT_ONCE)))
        return await watching


async def _alone(system: System, edits: Sequence[Edit], rounds: int) -> dict[Kind, float]:
    """The smallest latency of each kind of edit of the trace, alone."""
    kinds = {edit.kind: edit for edit in reversed(edits)}
    found: dict[Kind, float] = {}
    with Progress(console=console) as progress:
        for kind, edit in progress.track(sorted(kinds.items()), description="each kind of edit alone"):
            for _ in range(rounds):
                await system.forget()
                began = time.perf_counter()
                await system.edit(edit)
                found[kind] = min(time.perf_counter() - began, found.get(kind, float("inf")))
    return found


async def _point(
    system: System, factor: float, capacity: float, edits: Sequence[Edit], scale: Scale, alone_s: Mapping[Kind, float]
) -> Point:
    await system.forget()
    trace = openloop.poisson(SEED, factor * capacity, edits, scale.point_s)
    before = await system.work()
    before = Work(before.passes, before.rows, before.padding)
    with Progress(console=console) as progress:
        task = progress.add_task(f"load {factor}: {system.name}", total=len(trace))

        answers = await openloop.play(trace, system.edit, lambda: progress.advance(task))
    after = await system.work()
    passes, rows, padding = (
        after.passes - before.passes, after.rows - before.rows, after.padding - before.padding,
    )  # fmt: skip
    result = openloop.summary(answers, scale.point_s, lambda edit: alone_s[edit.kind])
    if result.failed:
        console.print("failed, for example: " + next(answer.error for answer in answers if answer.error))
    console.print(f"load {factor}, {system.name}: p95 {result.p95_s:.2f} s, {100 * result.in_time:.0f} % in time")
    return Point(factor, system.name, result, passes, rows / passes, padding / (rows + padding))


# --- tables -----------------------------------------------------------------------------------------------------


def table(found: Sweep) -> Table:
    """All points."""
    columns = (
        "load", "server", "requests", "p50 s", "p95 s", "p99 s", "in time", "goodput /s", "rows per pass", "padding",
        "failed", "generator late, p99 ms",
    )  # fmt: skip
    rows = tuple(
        (
            f"{point.factor}", point.system, f"{point.summary.count}", f"{point.summary.p50_s:.2f}",
            f"{point.summary.p95_s:.2f}", f"{point.summary.p99_s:.2f}", f"{100 * point.summary.in_time:.0f} %",
            f"{point.summary.goodput:.2f}", f"{point.rows_per_pass:.1f}", f"{100 * point.padding_share:.1f} %",
            f"{point.summary.failed}", f"{1000 * point.summary.lag_p99_s:.1f}",
        )
        for point in found.points
    )  # fmt: skip
    saturated = ", ".join(f"{name} {rate:.0f}" for name, rate in found.rows_per_s.items())
    notes = (
        f"Load 1 is our server's capacity, {found.capacity:.2f} edits/s of {found.rows_per_edit:.0f} rows each. "
        f"Saturated, network rows/s: {saturated}. All servers have the same network and the same traces; their "
        f"pictures {'are equal to the last bit' if found.equal_bytes else 'differ in last bits'}.",
        f"In time is within {openloop.GOOD:g} times the latency of the same kind of edit alone on our server. Latency "
        "counts from the intended time of sending.",
    )
    return Table("Open loop, Poisson arrivals", columns, rows, notes)


def plain(found: Sweep) -> dict[str, object]:
    """As values that JSON can hold."""
    return {
        "capacity": found.capacity,
        "rows_per_edit": found.rows_per_edit,
        "rows_per_s": dict(found.rows_per_s),
        "equal_bytes": found.equal_bytes,
        "alone_s": [[*kind, seconds] for kind, seconds in found.alone_s.items()],
        "points": [asdict(point) for point in found.points],
    }
