"""Traces: which requests arrive when."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.simulate.simulation import Arrival, Costs, simulate

MIX = {"ddim": 3, "edict": 3, "diffedit": 3, "sdedit": 1}
"""How often each method is asked for."""
PRIORITIES = ("batch", "normal", "interactive")
EQUAL = ((50,), (0.8,))
VARIED = ((20, 30, 50), (0.5, 0.6, 0.8, 1.0))
"""Steps and strengths that requests choose from."""


def requests(count: int, seed: int, choices: tuple[Sequence[int], Sequence[float]], priority: str) -> list[Arrival]:
    """Requests of mixed methods, all at time 0."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        (method,) = rng.choices([*MIX], [*MIX.values()])
        found.append(Arrival(0.0, method, rng.choice(choices[0]), rng.choice(choices[1]), priority))
    return found


def poisson(costs: Costs, arrivals: Sequence[Arrival], load: float, seed: int) -> list[Arrival]:
    """The same requests as a Poisson process, at a load relative to what the server does when all are there."""
    rng, at_s, spread_out = random.Random(seed), 0.0, []
    mean_s = simulate(costs, arrivals, queue_capacity=len(arrivals)).end_s / len(arrivals) / load
    for arrival in arrivals:
        at_s += rng.expovariate(1 / mean_s)
        spread_out.append(replace(arrival, at_s=at_s))
    return spread_out


def bursts(arrivals: Sequence[Arrival], size: int, every_s: float) -> list[Arrival]:
    """The same requests, so many at once."""
    return [replace(arrival, at_s=index // size * every_s) for index, arrival in enumerate(arrivals)]


def read(file: Path) -> list[Arrival]:
    """A trace of one's own; raises :class:`ValueError` or :class:`TypeError` if the file is none."""
    trace = [Arrival(**item) for item in json.loads(file.read_text())]
    for number, arrival in enumerate(trace):
        if arrival.method not in (*MIX, "learn"):
            raise ValueError(f"request {number}: no method '{arrival.method}'; there are {', '.join(MIX)} and learn")
        if arrival.priority not in PRIORITIES:
            raise ValueError(f"request {number}: no priority '{arrival.priority}'; there are {', '.join(PRIORITIES)}")
    if not trace:
        raise ValueError("no request is in the trace")
    return trace
