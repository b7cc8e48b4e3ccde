"""Requests through the server's own scheduling in virtual time, and the same served in simpler ways."""

import queue
from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import inf
from typing import Any, cast

import numpy as np
import torch
from underpaint_server.backends.toy import SCALE, SHAPE, ToyBackend
from underpaint_server.dispatch.job_handle import JobHandle
from underpaint_server.dispatch.queue import Dispatcher
from underpaint_server.dispatch.stall import CpuUse
from underpaint_server.dispatch.supervisor import EngineState
from underpaint_server.engine.loop import Engine
from underpaint_server.engine.messages import Ended, Order, Passed, Stop
from underpaint_server.engine.messages import Report as Message
from underpaint_server.engine.share import LOWER_SHARE, Turns
from underpaint_server.errors import UnderpaintError
from underpaint_server.jobs import (
    Descent,
    EditJob,
    Generated,
    InversionOptions,
    Job,
    LearnJob,
    LearnOptions,
    Photo,
    Priority,
    Sampler,
)
from underpaint_server.methods.ddim.options import DdimEdit, DdimInversion
from underpaint_server.methods.diffedit.options import DiffEdit
from underpaint_server.methods.edict.options import EdictEdit, EdictInversion
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.rows import Batch, Captured, Decode, Denoise, Embed, Encode, PullBackDecode, Row, Score
from underpaint_server.settings import Settings
from underpaint_server.telemetry import Metrics

MODEL = "simulated"
PX = SHAPE[1] * SCALE
SIDE_ROWS: Mapping[type[Row], int] = {Encode: 2, Decode: 2, Embed: 4, PullBackDecode: 2, Score: 2}
"""Size of the passes of rows that are not the network's, as in the torch backend."""
GOOD = 3.0
"""A request is good that takes at most this many times as long as it would alone."""
BATCH = 8
"""Most requests of one batch in request-level batching."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    """Seconds since the beginning."""
    method: str
    """edict, ddim, diffedit, sdedit, or learn: a direction, of ``steps`` steps and ``optimizer_steps`` of these."""
    steps: int = 50
    strength: float = 0.8
    priority: str = "normal"
    """interactive, normal or batch; learning has one of its own."""
    deadline_s: float | None = None
    """Seconds from its arrival; None for none."""
    optimizer_steps: int = 10

    @property
    def kind(self) -> tuple[str, int, float, int]:
        """What requests must have in common to take as long alone, and to be batched by a request-level batcher."""
        return (self.method, self.steps, self.strength, self.optimizer_steps)

    @property
    def name(self) -> str:
        """The class that its latency is reported under."""
        return "learning" if self.method == "learn" else self.priority


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of one pass. The default: the embedded model's network in bfloat16 by OpenVINO on two cores with AMX, its
    other parts in float32 by torch."""

    network: Mapping[str, float] = field(
        default_factory=lambda: {
            "1": 1 / 185, "2": 2 / 386, "4": 4 / 458, "8": 8 / 530, "16": 16 / 588, "32": 32 / 605
        }
    )  # fmt: skip
    """Rows of a pass -> seconds; linear in between, and beyond the last as slow per row as there."""
    encode: float = 0.0087
    decode: float = 0.0216
    embed: float = 0.0056
    pullback: float = 0.083
    pullbackdecode: float = 0.044
    score: float = 0.033

    def pass_s(self, batch: Batch) -> float:
        """Seconds of this pass."""
        return self.network_s(batch.size) if isinstance(batch.rows[0], Denoise) else self._side_s(type(batch.rows[0]))

    def network_s(self, rows: int) -> float:
        """Seconds of a pass of so many rows of the network."""
        sizes, seconds = [int(size) for size in self.network], list(self.network.values())
        if rows >= sizes[-1]:
            return seconds[-1] * rows / sizes[-1]
        return float(np.interp(rows, sizes, seconds))

    def _side_s(self, kind: type[Row]) -> float:
        return float(getattr(self, kind.__name__.lower()))


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one request."""

    arrival: Arrival
    latency_s: float
    """Seconds from its arrival to its end; infinite if it was refused or too late."""
    alone_s: float

    @property
    def is_good(self) -> bool:
        """Whether it took at most :data:`GOOD` times as long as alone."""
        return self.latency_s <= GOOD * self.alone_s


@dataclass(slots=True)
class Run:
    """One trace, served to its end."""

    served: list[Served]
    end_s: float = 0.0
    passes: int = 0
    rows: int = 0
    padding: int = 0
    busy_s: float = 0.0
    learning_s: float = 0.0
    """Device time of learning while other requests were there too."""
    contested_s: float = 0.0
    """Device time while learning and others were there."""


class _Clock:
    """Virtual time in seconds."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


class _Device(ToyBackend):
    """Answers with zeros, after the time that the table says."""

    def __init__(self, costs: Costs, wait: Callable[[float], None]) -> None:
        super().__init__(MODEL, Settings())
        self._costs = costs
        self._wait = wait

    def predict(self, batch: Batch) -> Sequence[Any]:
        """See :class:`Backend`."""
        self._wait(self._costs.pass_s(batch))
        if isinstance(batch.rows[0], Denoise):
            return [self._zeros(row) for row in batch.rows if isinstance(row, Denoise)]
        return super().predict(batch)

    def batch_class(self, kind: type[Row], shape: tuple[int, ...]) -> int | None:  # noqa: ARG002
        """See :class:`Backend`."""
        return SIDE_ROWS.get(kind)

    def minimum(self, kind: type[Row]) -> int:
        """See :class:`Backend`."""
        return SIDE_ROWS.get(kind, 1)

    @staticmethod
    def _zeros(row: Denoise) -> Any:
        zeros = torch.zeros_like(row.latents)
        return Captured(zeros, {}) if row.capture else zeros


class _Supervisor:
    """In place of an engine process: orders go to the engine in this one."""

    state = EngineState.READY
    errors: Mapping[str, UnderpaintError] = {}
    use = CpuUse(1.0)

    def __init__(self) -> None:
        self.orders: deque[Order] = deque()

    def send(self, order: Order) -> None:
        self.orders.append(order)

    def cpu_s(self) -> float | None:
        return None

    def reset_crashes(self) -> None:
        pass


class Simulation:
    """One server in virtual time. ``settings`` are its settings by their Python names; ``lower_share`` is the share of
    time of NORMAL and BATCH requests beside those above them."""

    def __init__(
        self, costs: Costs, trace: Iterable[Arrival], lower_share: float = LOWER_SHARE, **settings: Any
    ) -> None:
        self._arrivals = deque(sorted(trace, key=lambda arrival: arrival.at_s))
        self._device_time, self._front_time = _Clock(), _Clock()
        self._supervisor = _Supervisor()
        options = Settings(models=f"{MODEL}=toy:", **settings)
        self._dispatcher = Dispatcher(options, Metrics(), self._front_time, cast(Any, lambda *_: self._supervisor))
        self._device = _Device(costs, self._wait)
        self._engine = Engine(
            {MODEL: self._device}, cast(Any, self), self._on_report, options.max_batch_size, options.learn_share,
            clock=self._device_time,
        )  # fmt: skip
        self._engine._turns = Turns(options.learn_share, lower_share)
        self._contested = False
        self._inside: dict[int, Arrival] = {}
        self._ends: list[tuple[Arrival, float]] = []
        self._run = Run([])

    def run(self) -> Run:
        """Serve the trace to its end; ``served`` has no times alone yet."""
        self._engine.run()
        self._run.served = [Served(arrival, end_s - arrival.at_s, inf) for arrival, end_s in self._ends]
        self._run.end_s = self._device_time.time
        return self._run

    def get(self, *, block: bool) -> Order:
        """The engine's inbox: the next order; while there is none and it may block, the next arrival's time comes."""
        self._admit()
        while not self._supervisor.orders:
            if not block:
                raise queue.Empty
            if not self._arrivals:
                return Stop()
            self._device_time.time = max(self._device_time.time, self._arrivals[0].at_s)
            self._admit()
        return self._supervisor.orders.popleft()

    def _wait(self, seconds: float) -> None:
        self._device_time.time += seconds
        names = {arrival.name == "learning" for arrival in self._inside.values()}
        self._contested = len(names) == 2
        self._admit()

    def _admit(self) -> None:
        """Hand over the requests that have arrived by now."""
        while self._arrivals and self._arrivals[0].at_s <= self._device_time.time:
            arrival = self._arrivals.popleft()
            self._front_time.time = arrival.at_s
            priority = Priority.LEARNING if arrival.method == "learn" else Priority[arrival.priority.upper()]
            try:
                handle: JobHandle = self._dispatcher.submit(
                    _job(arrival.kind), priority=priority, deadline_s=arrival.deadline_s
                )
            except UnderpaintError:
                self._ends.append((arrival, inf))
            else:
                self._inside[handle.id] = arrival

    def _on_report(self, message: Message) -> None:
        self._front_time.time = self._device_time.time
        if isinstance(message, Passed):
            self._count(message)
        if isinstance(message, Ended):
            arrival = self._inside.pop(message.id)
            late = isinstance(message.outcome, UnderpaintError)
            self._ends.append((arrival, inf if late else self._device_time.time))
        self._dispatcher.on_report(message)

    def _count(self, message: Passed) -> None:
        run, rows = self._run, sum(message.rows_by_method.values())
        run.busy_s += message.duration_s
        if self._contested:
            run.contested_s += message.duration_s
            run.learning_s += message.duration_s * ("learn" in message.rows_by_method)
        if message.is_network:
            run.passes, run.rows, run.padding = run.passes + 1, run.rows + rows, run.padding + message.padding


def simulate(costs: Costs, trace: Sequence[Arrival], **options: Any) -> Run:
    """The trace through the server's scheduling; ``options`` as of :class:`Simulation`."""
    run = Simulation(costs, trace, **options).run()
    run.served = [replace(item, alone_s=_together_s(costs, item.arrival, 1)) for item in run.served]
    return run


def one_by_one(costs: Costs, trace: Sequence[Arrival]) -> Run:
    """The trace first come, first served, each request alone."""
    return _in_batches(costs, trace, 1)


def in_batches(costs: Costs, trace: Sequence[Arrival]) -> Run:
    """The trace by request-level batching."""
    return _in_batches(costs, trace, BATCH)


def _in_batches(costs: Costs, trace: Sequence[Arrival], size: int) -> Run:
    waiting, served, free_s = sorted(trace, key=lambda arrival: arrival.at_s), [], 0.0
    while waiting:
        begin_s = max(free_s, waiting[0].at_s)
        there = waiting[: bisect(waiting, begin_s, key=lambda arrival: arrival.at_s)]
        batch = [arrival for arrival in there if arrival.kind == there[0].kind][:size]
        free_s = begin_s + _together_s(costs, batch[0], len(batch))
        served += [Served(a, free_s - a.at_s, _together_s(costs, a, 1)) for a in batch]
        for arrival in batch:
            waiting.remove(arrival)
    return Run(served, end_s=free_s)


_TOGETHER: dict[tuple[str, tuple[str, int, float, int], int], float] = {}
"""Costs, kind of request and number -> seconds."""


def _together_s(costs: Costs, arrival: Arrival, count: int) -> float:
    """Seconds of so many equal requests that begin together on an idle server."""
    key = (str(costs), arrival.kind, count)
    if key not in _TOGETHER:
        same = replace(arrival, at_s=0.0, priority="normal", deadline_s=None)
        _TOGETHER[key] = Simulation(costs, [same] * count).run().end_s
    return _TOGETHER[key]


@cache
def _job(kind: tuple[str, int, float, int]) -> Job:
    method, steps, strength, optimizer_steps = kind
    photo = Photo(np.zeros((PX, PX, 3), np.uint8))
    if method == "learn":
        options = LearnOptions(
            "a", "b", "", steps, Sampler.DDIM, 3.0, steps // 2, 0.0, 0.1, Descent(optimizer_steps, 0.05), 5
        )
        return LearnJob(MODEL, options, (Generated("a", 5, PX, PX, steps),), None, optimizer_steps)
    edits = {
        "edict": (EdictEdit(), InversionOptions(EdictInversion(), steps, strength, 3.0, "a")),
        "ddim": (DdimEdit(), InversionOptions(DdimInversion(), steps, strength, 1.0, "")),
        "diffedit": (DiffEdit(None, 0.5, 10, 0.5, "a"), InversionOptions(DdimInversion(), steps, strength, 1.0, "")),
        "sdedit": (SdEdit(strength, steps), None),
    }
    edit, inversion = edits[method]
    return EditJob(MODEL, photo, inversion, edit, "b", "", 3.0, 1)
