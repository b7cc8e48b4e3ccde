"""The simulator of the scheduler: the real parts in virtual time, so minutes of traffic take a second."""

import json
import sys
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from benchmarks.simulate.__main__ import main
from benchmarks.simulate.simulation import Arrival, Costs, Run, one_by_one, simulate
from benchmarks.simulate.traces import VARIED, poisson, requests

COSTS = Costs()


def latencies_s(run: Run, name: str) -> list[float]:
    return sorted(item.latency_s for item in run.served if item.arrival.name == name)


def every(seconds: float, count: int, arrival: Arrival) -> list[Arrival]:
    return [replace(arrival, at_s=number * seconds) for number in range(count)]


def test_a_trace_gives_the_same_numbers_every_time() -> None:
    trace = poisson(COSTS, requests(20, 1, VARIED, "normal"), 0.8, 2)
    assert simulate(COSTS, trace) == simulate(COSTS, trace)
    assert len(simulate(COSTS, trace).served) == 20


def test_requests_share_passes_and_one_alone_takes_what_its_passes_take() -> None:
    one = Arrival(0.0, "sdedit", 10, 1.0)
    (alone,) = simulate(COSTS, [one]).served
    sides_s = COSTS.encode + COSTS.decode + COSTS.embed
    assert alone.latency_s == alone.alone_s == pytest.approx(10 * COSTS.network_s(2) + sides_s)
    together = simulate(COSTS, [one] * 8)
    assert together.rows / together.passes > 8
    assert together.end_s < 0.6 * one_by_one(COSTS, [one] * 8).end_s


def test_a_steady_stream_above_does_not_starve_what_is_below() -> None:
    """More interactive requests than the server can do; each priority below still ends its only request meanwhile."""
    stream = every(0.05, 100, Arrival(0.0, "sdedit", 50, 0.5, "interactive"))
    low = [Arrival(0.2, "sdedit", 20, 0.5, "batch"), Arrival(0.2, "sdedit", 20, 0.5, "normal")]
    run = simulate(COSTS, [*stream, *low], queue_capacity=200)
    strict = simulate(COSTS, [*stream, *low], queue_capacity=200, lower_share=0.0)
    for name in ("batch", "normal"):
        assert latencies_s(run, name)[0] < 0.5 * run.end_s
        assert latencies_s(strict, name)[0] > 0.9 * strict.end_s


def test_a_flood_below_hardly_delays_what_is_above() -> None:
    above = every(1.0, 10, Arrival(0.0, "ddim", 20, 0.8, "interactive"))
    flood = [Arrival(0.0, "edict", 50, 0.8, "batch")] * 40
    quiet, beside = (simulate(COSTS, trace) for trace in (above, [*flood, *above]))
    assert latencies_s(beside, "interactive")[-1] < 1.5 * latencies_s(quiet, "interactive")[-1]
    assert latencies_s(beside, "batch")[-1] < inf


def test_learning_has_its_share_beside_short_requests() -> None:
    """Whose passes are several times longer than theirs."""
    short = every(0.3, 40, Arrival(0.0, "sdedit", 20, 0.5))
    run = simulate(COSTS, [Arrival(0.0, "learn", 20, optimizer_steps=20), *short])
    assert run.learning_s / run.contested_s == pytest.approx(0.25, abs=0.05)
    fifo = one_by_one(COSTS, [Arrival(0.0, "learn", 20, optimizer_steps=20), *short])
    assert latencies_s(fifo, "normal")[-3] > 10 * latencies_s(run, "normal")[-3]


def test_deadlines_are_kept_or_refused_in_virtual_time_too() -> None:
    trace = [*every(1.0, 20, Arrival(0.0, "ddim")), Arrival(30.0, "ddim", deadline_s=0.01)]
    served = simulate(COSTS, trace).served
    assert [item.latency_s == inf for item in sorted(served, key=lambda item: item.arrival.at_s)] == [False] * 20 + [
        True
    ]


def test_a_file_of_arrivals_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, costs = tmp_path / "trace.json", tmp_path / "costs.json"
    trace.write_text(json.dumps([{"at_s": 0, "method": "ddim"}, {"at_s": 1, "method": "edict", "priority": "batch"}]))
    costs.write_text(json.dumps({"network": {"1": 0.01, "16": 0.02}}))
    monkeypatch.setattr(sys, "argv", ["simulate", str(trace), "--costs", str(costs)])
    main()
    printed = capsys.readouterr().err
    assert all(word in printed for word in ("p95", "one by one", "request batches", "| batch |", "| normal |"))
    for wrong in ('[{"at_s": 0, "method": "magic"}]', '[{"at_s": 0, "method": "ddim", "priority": "high"}]', "[]", "{"):
        trace.write_text(wrong)
        with pytest.raises(SystemExit):
            main()
