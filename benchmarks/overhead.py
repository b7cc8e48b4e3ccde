"""The engine's time outside the network, per forward pass: its loop, the methods' arithmetic, its reports."""

import multiprocessing
import queue
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from statistics import median

from underpaint_server.backends import load
from underpaint_server.backends.protocol import Backend
from underpaint_server.engine.loop import Engine
from underpaint_server.engine.messages import Ended, Order, Passed, StartJob, Stop
from underpaint_server.engine.messages import Report as Message
from underpaint_server.errors import UnderpaintError
from underpaint_server.jobs import EditJob, EditOptions, InversionOptions, Photo, Priority
from underpaint_server.methods.ddim.options import DdimEdit, DdimInversion
from underpaint_server.methods.diffedit.options import DiffEdit
from underpaint_server.methods.edict.options import EdictEdit, EdictInversion
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.settings import Settings

from benchmarks import cases
from benchmarks.report import Report, Table, console, spread

TOY, REAL = "toy", "underpaint-mini"
ABOUT = (
    "The engine's own loop, in this process, with the closed-form toy network and with the embedded model (float32), "
    "on the same mix of EDICT, DDIM, DiffEdit and SDEdit edits, {steps} steps; its reports go through a pipe to "
    "another process, as on a server. 'Outside the backend' is everything that is no forward pass: scheduling, the "
    "methods' float64 arithmetic, reports. Networks alternate (A B A B ...); medians over the rounds, with smallest "
    "and largest."
)


@dataclass(frozen=True, slots=True)
class Round:
    """One mix of jobs, run to its end."""

    network: str
    jobs: int
    passes: int
    total_s: float
    backend_s: float

    @property
    def outside_us(self) -> float:
        """Microseconds outside the backend per pass."""
        return 1e6 * (self.total_s - self.backend_s) / self.passes

    @property
    def share(self) -> float:
        """Share of the time that is spent outside the backend, in percent."""
        return 100 * (1 - self.backend_s / self.total_s)

    @property
    def pass_ms(self) -> float:
        """Mean duration of a pass in milliseconds."""
        return 1e3 * self.backend_s / self.passes


def run(quick: bool) -> Report:
    """Run the benchmark; see the module."""
    steps, repeats, loads = (20, 2, (1, 8)) if quick else (50, 3, (1, 8, 16))
    settings = Settings()
    loaded = {TOY: load("toy:", TOY, settings), REAL: load("", REAL, settings)}
    rounds: list[Round] = []
    for jobs in loads:
        for number in range(repeats + 1):
            pair = [_round(loaded[name], jobs, steps, settings.max_batch_size) for name in (TOY, REAL)]
            if number > 0:  # the first round is warm-up
                rounds += pair
        console.print(f"{jobs} jobs: {rounds[-2].outside_us:.0f} and {rounds[-1].outside_us:.0f} us a pass")
    return Report(
        name="overhead",
        about=ABOUT.format(steps=steps),
        tables=(_table(rounds, loads),),
        findings=tuple(_finding(rounds, jobs) for jobs in loads),
        figures={"rounds": [asdict(item) for item in rounds]},
    )


def _round(backend: Backend, jobs: int, steps: int, max_batch_size: int) -> Round:
    inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
    passed: list[Passed] = []
    left = set(range(jobs))
    with _Reader() as send:

        def report(message: Message) -> None:
            send(message)
            if isinstance(message, Passed):
                passed.append(message)
            elif isinstance(message, Ended):
                if isinstance(message.outcome, UnderpaintError):
                    raise message.outcome
                left.discard(message.id)
                if not left:
                    inbox.put(Stop())

        engine = Engine({backend.facts.info.id: backend}, inbox, report, max_batch_size, 0.25)
        for number, job in enumerate(_jobs(backend, jobs, steps)):
            inbox.put(StartJob(number, job, Priority.NORMAL, time.monotonic(), None, 0))
        began = time.perf_counter()
        engine.run()
        total_s = time.perf_counter() - began
    return Round(backend.facts.info.id, jobs, len(passed), total_s, sum(message.duration_s for message in passed))


def _jobs(backend: Backend, count: int, steps: int) -> list[EditJob]:
    info, known = backend.facts.info, cases.load()
    methods: list[tuple[EditOptions, EdictInversion | DdimInversion | None]] = [
        (EdictEdit(), EdictInversion()), (DdimEdit(), DdimInversion()),
        (DiffEdit(None, 0.5, 10, 0.5, ""), DdimInversion()), (SdEdit(0.8, steps), None),
    ]  # fmt: skip
    jobs = []
    for number in range(count):
        case, (method, inversion) = known[number], methods[number % len(methods)]
        photo = Photo(case.source[: info.height, : info.width].copy())
        options = None if inversion is None else InversionOptions(inversion, steps, 0.8, 3.0, case.source_prompt)
        jobs.append(EditJob(info.id, photo, options, method, case.target_prompt, "", 3.0, number))
    return jobs


class _Reader:
    """Another process that receives the engine's reports, as the front process of a server does."""

    def __enter__(self) -> Callable[[Message], None]:
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=_receive, args=(child_pipe,))
        self._process.start()
        child_pipe.close()
        self._pipe.recv()  # wait until it reads, so that its start is not timed
        return self._pipe.send

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()


def _receive(pipe: Connection) -> None:
    pipe.send("listening")
    try:
        while True:
            pipe.recv()
    except EOFError:
        return


# --- tables -----------------------------------------------------------------------------------------------------


def _table(rounds: list[Round], loads: tuple[int, ...]) -> Table:
    columns = ("jobs at once", "network", "passes", "pass ms", "outside the backend us per pass", "share of all time %")
    rows = []
    for jobs in loads:
        for network in (TOY, REAL):
            mine = _of(rounds, network, jobs)
            rows.append((
                f"{jobs}", network, f"{mine[0].passes}", spread([r.pass_ms for r in mine]),
                spread([r.outside_us for r in mine], 0), spread([r.share for r in mine]),
            ))  # fmt: skip
    return Table("Time outside the backend", columns, tuple(rows))


def _finding(rounds: list[Round], jobs: int) -> str:
    toy, real = _of(rounds, TOY, jobs), _of(rounds, REAL, jobs)
    loop_us, pass_us = median(r.outside_us for r in toy), 1e3 * median(r.pass_ms for r in real)
    return (
        f"{jobs} job{'s' if jobs > 1 else ''} at once: the loop takes {loop_us:.0f} us a pass over the toy, "
        f"{100 * loop_us / pass_us:.2f} % of a real pass; over the real network {median(r.share for r in real):.2f} % "
        f"of all time is outside it."
    )


def _of(rounds: list[Round], network: str, jobs: int) -> list[Round]:
    return [r for r in rounds if (r.network, r.jobs) == (network, jobs)]
