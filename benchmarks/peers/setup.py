"""How the server is started in this benchmark, and how much a run measures."""

from collections.abc import Mapping
from dataclasses import dataclass

from underpaint_server.backends import load
from underpaint_server.backends.protocol import Backend
from underpaint_server.settings import Settings

MODEL_ID = "underpaint-mini"
SERVER: Mapping[str, object] = {"reuse_bytes": 0}
"""Settings of the server under test, by their Python names; all others are as it is installed. Rounds and loads repeat
the same edits, so it must not keep what it computed. The network behind the other serving frameworks is loaded with the
same settings, so that only scheduling differs. ``UNDERPAINT_*`` variables change both alike."""
AT_ONCE = 8
"""Requests of the closed comparison, and the largest batch of the request-level batchers."""
BATCH_TIMEOUT_S = 0.05
"""How long a request-level batcher waits for a batch to fill."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much a run measures."""

    steps: int
    """Steps of the schedule in the closed comparison."""
    check_steps: int
    """Steps in the comparison of outputs before anything is timed, and in the warm-up."""
    rounds: int
    """Rounds of the closed comparison."""
    slow_rounds: int
    """Rounds that the eager networks take part in; they are several times slower."""
    sizes: tuple[int, ...]
    """Rows of a pass whose speed is measured."""
    pass_rounds: int
    """Rounds of that measurement."""
    cell_s: float
    """Seconds of one network at one size in one such round."""
    factors: tuple[float, ...]
    """Load factors of the open loop: shares of the server's capacity."""
    point_s: float
    """Seconds of requests at one load factor."""
    capacity_s: float
    """Seconds of one measurement of the capacity."""
    capacity_rounds: int
    trace_steps: tuple[int, ...]
    """Steps of the schedule that requests of the open loop choose from."""
    learning_steps: int
    """Steps of the schedule of the direction that is learned."""
    optimization_steps: int
    """Optimiser steps of the direction that is learned."""


FULL = Scale(
    steps=50, check_steps=10, rounds=3, slow_rounds=1, sizes=(1, 2, 4, 8, 16, 32), pass_rounds=3, cell_s=0.3,
    factors=(0.6, 0.8, 1.0), point_s=24.0, capacity_s=12.0, capacity_rounds=1,
    trace_steps=(20, 30, 50), learning_steps=50, optimization_steps=4,
)  # fmt: skip
QUICK = Scale(
    steps=8, check_steps=4, rounds=1, slow_rounds=1, sizes=(1, 2, 8, 16), pass_rounds=1, cell_s=0.1,
    factors=(0.6, 0.8), point_s=8.0, capacity_s=4.0, capacity_rounds=1,
    trace_steps=(4, 8), learning_steps=10, optimization_steps=2,
)  # fmt: skip


def backend(location: str = "", **settings: object) -> Backend:
    """The server's own backend in this process, as :data:`SERVER` says or with other settings."""
    return load(location, MODEL_ID, Settings(**{**SERVER, **settings}))  # type: ignore[arg-type]
