"""Open loop: requests are sent when a trace says so, whatever the answers take.

A generator that waits for answers before it sends the next request hides a slow server: it sends less while the server
is slow. Here every request has an intended time, its latency counts from that time even if it was sent later, and how
late the generator itself was is reported.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.peers.edits import Edit, make

MIX = {"ddim": 0.3, "edict": 0.3, "diffedit": 0.3, "content_injection": 0.1}
"""Method -> share of the requests."""
STRENGTHS = (0.5, 0.75, 1.0)
"""Strengths that requests choose from."""
WARM_UP = 0.1
"""Share of the time whose requests are sent but not counted."""
GOOD = 3.0
"""A request is answered in time within this multiple of its latency alone."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    """When it is to be sent, in seconds from the start."""
    edit: Edit


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request; times are in seconds from the start."""

    arrival: Arrival
    sent_s: float
    done_s: float
    error: str = ""
    """Why it failed; empty if it was answered."""

    @property
    def latency_s(self) -> float:
        """Seconds from the intended time to the answer."""
        return self.done_s - self.arrival.at_s

    @property
    def lag_s(self) -> float:
        """Seconds by which the generator sent it late."""
        return self.sent_s - self.arrival.at_s


def requests(seed: int, count: int, steps: Sequence[int]) -> list[Edit]:
    """The first ``count`` requests of a trace: methods by :data:`MIX`, each with its own photo, schedule and seed."""
    draw = random.Random(f"requests {seed}")
    methods = draw.choices(list(MIX), list(MIX.values()), k=count)
    return [make(method, k + 1, draw.choice(steps), draw.choice(STRENGTHS)) for k, method in enumerate(methods)]


def poisson(seed: int, rate: float, edits: Sequence[Edit], seconds: float) -> list[Arrival]:
    """A trace of ``rate`` requests a second with exponential gaps.

    The gaps of another rate are the same but for their scale, so that all rates and all servers have the same trace.
    """
    draw, at_s, trace = random.Random(f"gaps {seed}"), 0.0, []
    for edit in edits:
        at_s += draw.expovariate(1.0) / rate
        if at_s >= seconds:
            break
        trace.append(Arrival(at_s, edit))
    return trace


async def play(
    trace: Sequence[Arrival],
    send: Callable[[Edit], Awaitable[object]],
    on_answer: Callable[[], object] = lambda: None,
) -> list[Answer]:
    """Send all requests at their times and wait for all answers; they are in the order of the trace.

    An exception of ``send`` is an answer with an error. Times are those of the running loop.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def one(arrival: Arrival) -> Answer:
        sent_s = loop.time() - start
        error = ""
        try:
            await send(arrival.edit)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        answer = Answer(arrival, sent_s, loop.time() - start, error)
        on_answer()
        return answer

    tasks = []
    for arrival in trace:
        await asyncio.sleep(max(0.0, start + arrival.at_s - loop.time()))
        tasks.append(asyncio.create_task(one(arrival)))
    return list(await asyncio.gather(*tasks))


@dataclass(frozen=True, slots=True)
class Summary:
    """The answers of one trace."""

    count: int
    """Requests that are counted: those after the warm-up."""
    p50_s: float
    p95_s: float
    p99_s: float
    in_time: float
    """Share of the requests that were answered within :data:`GOOD` times their latency alone, 0 to 1."""
    goodput: float
    """Such requests a second."""
    lag_p99_s: float
    """99th percentile of how late the generator sent a request."""
    failed: int
    """Requests that were answered with an error. They count as late, with the time until the error as their latency."""


def summary(answers: Sequence[Answer], seconds: float, alone_s: Callable[[Edit], float]) -> Summary:
    """Statistics of a trace of ``seconds``, without its warm-up; ``alone_s`` is the latency of an edit alone."""
    counted = [answer for answer in answers if answer.arrival.at_s >= WARM_UP * seconds]
    if not counted:
        raise ValueError("no request is left after the warm-up: measure for longer")
    latencies = [answer.latency_s for answer in counted]
    in_time = sum(
        not answer.error and answer.latency_s <= GOOD * alone_s(answer.arrival.edit) for answer in counted
    )  # fmt: skip
    p50, p95, p99 = (float(value) for value in np.quantile(latencies, (0.5, 0.95, 0.99)))
    return Summary(
        count=len(counted),
        p50_s=p50,
        p95_s=p95,
        p99_s=p99,
        in_time=in_time / len(counted),
        goodput=in_time / (seconds * (1 - WARM_UP)),
        lag_p99_s=float(np.quantile([answer.lag_s for answer in counted], 0.99)),
        failed=sum(bool(answer.error) for answer in counted),
    )


def first_come_first_served(arrivals_s: Sequence[float], service_s: float, busy_until_s: float) -> list[float]:
    """Latencies of requests of ``service_s`` each that are served one after another, in the order of arrival, by a
    server that works on something else until ``busy_until_s``."""
    free_s, latencies = busy_until_s, []
    for at_s in arrivals_s:
        free_s = max(free_s, at_s) + service_s
        latencies.append(free_s - at_s)
    return latencies
