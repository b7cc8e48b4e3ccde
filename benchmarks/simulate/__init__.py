"""Requests in virtual time through the server's own scheduling, with a table of how long passes take.

``python -m benchmarks simulate`` runs the standard traces; ``python -m benchmarks.simulate FILE`` replays arrivals of
one's own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.report import Report, Table, console
from benchmarks.simulate.simulation import BATCH, GOOD, Arrival, Costs, Run, in_batches, one_by_one, simulate
from benchmarks.simulate.traces import EQUAL, VARIED, bursts, poisson, requests

ABOUT = (
    "Requests in virtual time through the server's own admission, queue, scheduler and methods; only the network is "
    "replaced, by zeros and by a table of how long passes take: that of the embedded model's network in bfloat16 by "
    "OpenVINO, its other parts in float32 by torch, on two cores with AMX. Beside it, the same requests one after "
    "another in the order of arrival, and in batches of up to {batch} equal ones (method, steps, strength), as a "
    "request-level batcher forms them when it is free. Latency, in seconds, counts from the arrival. Good is a request "
    "that takes at most {good:g} times as long as alone. Load is relative to what the server can do when all requests "
    "are there at once. Everything is seeded: a run gives the same numbers on every machine."
)


@dataclass(frozen=True, slots=True)
class Case:
    """One trace, served in several ways."""

    name: str
    runs: Mapping[str, Run]
    """Name of the way -> what became of the requests; the server's own first."""


OURS, FIFO, BATCHES, STRICT = "this server", "one by one", "request batches", "strict priorities"


def run(quick: bool) -> Report:
    """Run the benchmark; see the module."""
    count = 100 if quick else 1000
    costs = Costs()
    plain = [*_plain(costs, count)]
    flood, overload = _flood(costs, count), _overload(costs, count)
    learning = _learning(costs, count)
    cases_ = [*plain, flood, overload, learning]
    for case in cases_:
        console.print(f"{case.name}: p95 {_percentile(case.runs[OURS], 95):.2f} s")
    return Report(
        name="simulate",
        about=ABOUT.format(batch=BATCH, good=GOOD),
        tables=(latencies(cases_), passes(cases_)),
        findings=(*_plain_findings(plain), *_priority_findings(flood, overload), _learning_finding(learning)),
        figures={"costs": asdict(costs), "cases": [_figures(case) for case in cases_]},
    )


def _plain(costs: Costs, count: int) -> Iterator[Case]:
    """Requests of one priority."""
    for name, choices in (("equal", EQUAL), ("varied", VARIED)):
        arrivals = requests(count, 1, choices, "normal")
        for load in (0.5, 0.8, 0.95):
            yield _compared(costs, f"{name} requests, load {load:g}", poisson(costs, arrivals, load, 2))
    yield _compared(costs, "bursts of 40 varied requests", bursts(requests(count, 3, VARIED, "normal"), 40, 15.0))


def _flood(costs: Costs, count: int) -> Case:
    """Interactive requests at a third of the load, beside as many of a batch that were sent at once."""
    quiet = poisson(costs, requests(count // 2, 4, VARIED, "interactive"), 0.3, 5)
    trace = [*requests(count // 4, 6, EQUAL, "batch"), *quiet]
    return _by_priority(costs, "interactive requests, load 0.3, and a flood of batch", trace)


def _overload(costs: Costs, count: int) -> Case:
    """More interactive requests than the server can do, and a few others."""
    busy = poisson(costs, requests(count, 7, VARIED, "interactive"), 1.1, 8)
    rare = [Arrival(at, "ddim", priority="batch") for at in np.linspace(0, busy[-1].at_s / 2, 20).tolist()]
    return _by_priority(costs, "interactive requests, load 1.1, and a few of batch", [*busy, *rare])


def _learning(costs: Costs, count: int) -> Case:
    """Short edits while a direction is learned."""
    short = poisson(costs, requests(count // 4, 9, ((20,), (0.5,)), "normal"), 0.3, 10)
    learn = Arrival(short[-1].at_s / 10, "learn", 50, optimizer_steps=10)
    return _compared(costs, "short requests, load 0.3, and a direction that is learned", [*short, learn])


def _compared(costs: Costs, name: str, trace: Sequence[Arrival]) -> Case:
    ours = simulate(costs, trace, queue_capacity=len(trace))
    return Case(name, {OURS: ours, FIFO: one_by_one(costs, trace), BATCHES: in_batches(costs, trace)})


def _by_priority(costs: Costs, name: str, trace: Sequence[Arrival]) -> Case:
    ours = simulate(costs, trace, queue_capacity=len(trace))
    strict = simulate(costs, trace, queue_capacity=len(trace), lower_share=0.0)
    return Case(name, {OURS: ours, STRICT: strict, FIFO: one_by_one(costs, trace)})


def _latencies_s(run: Run, name: str = "") -> list[float]:
    return sorted(item.latency_s for item in run.served if name in ("", item.arrival.name))


def _percentile(run: Run, percent: int, name: str = "") -> float:
    """By the nearest rank; without a name, of all requests but learning."""
    found = _latencies_s(run, name) if name else sorted(s.latency_s for s in run.served if s.arrival.method != "learn")
    return found[max(0, ceil(percent / 100 * len(found)) - 1)]


def _good(run: Run, name: str) -> float:
    return mean(item.is_good for item in run.served if item.arrival.name == name)


def _names(case: Case) -> list[str]:
    return sorted({item.arrival.name for item in case.runs[OURS].served})


def latencies(cases_: Sequence[Case]) -> Table:
    """Percentiles of the latency of each class of requests, and the share of good ones, by way of serving."""
    rows = []
    for case in cases_:
        for name in _names(case):
            for way, served in case.runs.items():
                percentiles = (f"{_percentile(served, percent, name):.2f}" for percent in (50, 95, 99))
                of = len(_latencies_s(served, name))
                rows.append((case.name, name, f"{of}", way, *percentiles, f"{100 * _good(served, name):.0f}"))
    columns = ("trace", "requests", "number", "served by", "p50 s", "p95 s", "p99 s", "good %")
    return Table("Latency", columns, tuple(rows))


def passes(cases_: Sequence[Case]) -> Table:
    """The passes of the server's own way, and how busy the device was."""
    rows = []
    for case in cases_:
        ours = case.runs[OURS]
        padding = 100 * ours.padding / (ours.rows + ours.padding)
        learning = f"{100 * ours.learning_s / ours.contested_s:.0f}" if ours.contested_s else ""
        rows.append((
            case.name, f"{ours.passes}", f"{ours.rows / ours.passes:.1f}", f"{padding:.1f}",
            f"{100 * ours.busy_s / ours.end_s:.0f}", learning,
        ))  # fmt: skip
    columns = ("trace", "network passes", "rows per pass", "padding %", "device busy %", "learning % beside others")
    return Table("Passes of this server", columns, tuple(rows))


def _plain_findings(plain: Sequence[Case]) -> Iterator[str]:
    for case in plain:
        ours, fifo, batches = (_percentile(case.runs[way], 95) for way in (OURS, FIFO, BATCHES))
        yield (
            f"{case.name[0].upper()}{case.name[1:]}: p95 {ours:.2f} s, {batches / ours:.1f} times better than request "
            f"batches and {fifo / ours:.1f} times better than one by one."
        )


def _priority_findings(flood: Case, overload: Case) -> Iterator[str]:
    for case in (flood, overload):
        (ours, low), (strict, strict_low) = (
            [_percentile(case.runs[way], 95, "interactive"), _percentile(case.runs[way], 99, "batch")]
            for way in (OURS, STRICT)
        )
        yield (
            f"{case.name[0].upper()}{case.name[1:]}: p95 of interactive {ours:.2f} s, with strict priorities "
            f"{strict:.2f} s; p99 of batch {low:.0f} s, with strict priorities {strict_low:.0f} s."
        )


def _learning_finding(case: Case) -> str:
    ours, fifo = (_percentile(case.runs[way], 95, "normal") for way in (OURS, FIFO))
    learnt, alone = (_percentile(case.runs[way], 99, "learning") for way in (OURS, FIFO))
    return (
        f"While a direction is learned, p95 of short requests is {ours:.2f} s, {fifo / ours:.0f} times better than in "
        f"the order of arrival; the direction takes {learnt:.0f} s, alone {alone:.0f} s."
    )


def _figures(case: Case) -> dict[str, Any]:
    ours = case.runs[OURS]
    counts = {name: getattr(ours, name) for name in ("end_s", "passes", "rows", "padding", "busy_s", "learning_s")}
    return {
        "trace": case.name,
        **counts,
        "latency_s": {
            way: {name: {f"p{p}": _percentile(served, p, name) for p in (50, 90, 95, 99, 100)} for name in _names(case)}
            for way, served in case.runs.items()
        },
    }
