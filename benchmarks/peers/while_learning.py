"""Short edits while a direction is learned, beside what first come, first served would make of them."""

import time
from dataclasses import asdict, dataclass

import numpy as np
from rich.progress import Progress
from underpaint import AsyncClient, AsyncLearning, GradientLearning
from underpaint_server.local_server import LocalServer

from benchmarks.peers import openloop
from benchmarks.peers.edits import Edit, make
from benchmarks.peers.openloop import Answer
from benchmarks.peers.setup import Scale
from benchmarks.report import Table, console

SHORT = ("sdedit", 20, 0.5)
"""Method, steps and strength of a short edit."""
LOAD = 0.2
"""Offered load of the short edits, as a share of our server's saturated rows."""
FEWEST = 10
"""Edits that are sent at least, on average."""
LONGER = 40
"""The learning beside the edits is so many times longer, so that it does not end before them; then it is cancelled."""
_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Latencies of the same short edits in three ways."""

    learning_s: float
    """Seconds of the learning alone."""
    window_s: float
    """Seconds in which the edits are sent: as long as the learning takes alone, or longer if these are too few."""
    count: int
    quiet_p95_s: float
    """While nothing is learned."""
    beside_p95_s: float
    """While a direction is learned."""
    in_order_p95_s: float
    """Computed: one after another behind a learning of ``window_s``, each at the server's saturated pace."""
    pace: float
    """Pace of the learning beside the edits as a share of its pace alone."""

    @property
    def gain(self) -> float:
        """How many times smaller the 95th percentile is than with first come, first served."""
        return self.in_order_p95_s / self.beside_p95_s


async def measure(scale: Scale, server: LocalServer, rows_per_s: float) -> Outcome:
    """Learn alone, send the short edits alone, then both together. ``rows_per_s`` is the server's saturated pace."""
    async with AsyncClient(server.target, timeout=_TIMEOUT_S) as client:
        with Progress(console=console) as progress:
            task = progress.add_task("learning a direction alone", total=3)
            learning_s = await _learn_alone(client, scale)
            service_s = make(*_short(0)).rows() / rows_per_s
            edits = [make(*_short(k)) for k in range(2000)]
            window_s = max(learning_s, FEWEST * service_s / LOAD)
            trace = openloop.poisson(2, LOAD / service_s, edits, window_s)

            async def send(edit: Edit) -> object:
                return await client.edit(**edit.call())

            progress.update(task, description="short edits alone", advance=1)
            quiet = await openloop.play(trace, send)
            progress.update(task, description="short edits while a direction is learned", advance=1)
            began = time.perf_counter()
            learning = await _learn(client, scale, "beside", LONGER)
            beside = await openloop.play(trace, send)
            state = await learning.status()
            beside_s = time.perf_counter() - began
            await learning.cancel()
            progress.advance(task)
    if state.done:
        raise SystemExit("the learning ended before the short edits did, so they were not all beside it")
    learned = LONGER * (state.progress.fraction if state.progress is not None else 0.0)
    in_order = openloop.first_come_first_served([arrival.at_s for arrival in trace], service_s, window_s)
    return Outcome(
        learning_s=learning_s,
        window_s=window_s,
        count=len(trace),
        quiet_p95_s=_p95(quiet),
        beside_p95_s=_p95(beside),
        in_order_p95_s=float(np.quantile(in_order, 0.95)),
        pace=learned * learning_s / beside_s,
    )


def table(found: Outcome) -> Table:
    """The three ways."""
    rows = (
        ("nothing is learned", f"{found.quiet_p95_s:.3f}"),
        ("a direction is learned", f"{found.beside_p95_s:.3f}"),
        ("first come, first served behind the learning (computed)", f"{found.in_order_p95_s:.3f}"),
    )
    notes = (
        f"{found.count} edits ({SHORT[0]}, {SHORT[1]} steps, strength {SHORT[2]}) at {LOAD} of the capacity in "
        f"{found.window_s:.1f} s. The learning takes {found.learning_s:.1f} s alone; beside the edits it kept "
        f"{100 * found.pace:.0f} % of its pace. The last line is of a learning that takes as long as the edits are "
        "sent, and of edits at the server's saturated pace.",
    )
    caption = "Short edits while a direction is learned, 95th percentile of the latency"
    return Table(caption, ("while", "p95 s"), rows, notes)


def plain(found: Outcome) -> dict[str, object]:
    """As values that JSON can hold."""
    return asdict(found) | {"gain": found.gain}


async def _learn_alone(client: AsyncClient, scale: Scale) -> float:
    began = time.perf_counter()
    learning = await _learn(client, scale, "alone", 1)
    await learning.result()
    return time.perf_counter() - began


async def _learn(client: AsyncClient, scale: Scale, name: str, times: int) -> AsyncLearning:
    """Start to learn, ``times`` as long as the learning that is compared with."""
    method = GradientLearning(optimization_steps=times * scale.optimization_steps)
    return await client.learn(
        "a red apple", "a green apple", [3], name=f"peers-{name}", steps=scale.learning_steps, method=method
    )


def _short(number: int) -> tuple[str, int, int, float]:
    method, steps, strength = SHORT
    return method, 9000 + number, steps, strength


def _p95(answers: list[Answer]) -> float:
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise SystemExit(f"{len(failed)} short edits failed, for example: {failed[0]}")
    return float(np.quantile([answer.latency_s for answer in answers], 0.95))
