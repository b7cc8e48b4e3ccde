"""The engine's own loop in this process, with its real jobs: what a server computes, without sockets."""

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
from underpaint_server.backends.protocol import Backend
from underpaint_server.engine.loop import Engine
from underpaint_server.engine.messages import Ended, Order, Passed, Previewed, StartJob, Stop
from underpaint_server.engine.messages import Report as Message
from underpaint_server.errors import UnderpaintError
from underpaint_server.jobs import (
    Companion,
    EditJob,
    EditOptions,
    Interpolation,
    InversionOptions,
    InvertJob,
    Job,
    Photo,
    Picture,
    Priority,
    Result,
)
from underpaint_server.methods.content_injection.options import ContentInjection
from underpaint_server.methods.ddim.options import DdimEdit, DdimInversion
from underpaint_server.methods.diffedit.options import DiffEdit
from underpaint_server.methods.edict.options import EdictEdit, EdictInversion
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.plans import total_rows
from underpaint_server.settings import Settings

STRENGTH, GUIDANCE = 0.8, 3.0
METHODS = ("edict", "ddim", "diffedit", "sdedit", "content_injection")


@dataclass(slots=True)
class Run:
    """What an engine did with some jobs."""

    jobs: int
    total_s: float = 0.0
    planned: int = 0
    """Network rows of the jobs' plans."""
    passes: list[Passed] = field(default_factory=list)
    """Those of the network."""
    other_s: float = 0.0
    """Seconds of the passes of the autoencoder and the text encoder."""
    latency_s: list[float] = field(default_factory=list)
    """Of each job, from when it was to arrive."""
    preview_s: float | None = None
    """Until the first preview."""
    results: dict[int, Result] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Network rows that were computed, without padding."""
        return sum(sum(one.rows_by_method.values()) for one in self.passes)

    @property
    def sizes(self) -> list[int]:
        """Rows of each pass of the network, with padding."""
        return [sum(one.rows_by_method.values()) + one.padding for one in self.passes]

    @property
    def rows_per_s(self) -> float:
        """Network rows by second."""
        return self.rows / self.total_s

    @property
    def rows_per_pass(self) -> float:
        """Mean network rows of a pass, without padding."""
        return self.rows / len(self.passes)

    @property
    def padding(self) -> float:
        """Share of rows that belong to no job."""
        padding = sum(one.padding for one in self.passes)
        return padding / (padding + self.rows)

    @property
    def outside(self) -> float:
        """Share of the time that is outside all passes, by the device's clock where it has one."""
        return max(0.0, 1 - (sum(one.duration_s for one in self.passes) + self.other_s) / self.total_s)


def run(
    backend: Backend, settings: Settings, jobs: Sequence[Job], at: Sequence[float] | None = None, preview_every: int = 0
) -> Run:
    """Run jobs to their end. They start together, or ``at`` so many seconds after the beginning."""
    inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
    done = Run(len(jobs), planned=sum(total_rows(job) for job in jobs))
    due = [0.0] * len(jobs) if at is None else at

    def report(message: Message) -> None:
        match message:
            case Passed():
                if message.is_network:
                    done.passes.append(message)
                else:
                    done.other_s += message.duration_s
            case Previewed() if done.preview_s is None:
                done.preview_s = time.monotonic() - began
            case Ended(id=number, outcome=outcome):
                if isinstance(outcome, UnderpaintError):
                    raise outcome
                done.results[number] = outcome
                done.latency_s.append(time.monotonic() - began - due[number])
                if len(done.results) == len(jobs):
                    inbox.put(Stop())

    def start() -> None:
        for number, job in enumerate(jobs):
            time.sleep(max(0.0, began + due[number] - time.monotonic()))
            inbox.put(StartJob(number, job, Priority.NORMAL, time.monotonic(), None, preview_every))

    engine = Engine(
        {backend.facts.info.id: backend}, inbox, report, settings.max_batch_size, settings.learn_share,
        reuse_bytes=settings.reuse_bytes,
    )  # fmt: skip
    began = time.monotonic()
    if at is None:
        start()
    else:
        threading.Thread(target=start, daemon=True).start()
    engine.run()
    done.total_s = time.monotonic() - began
    return done


def edit(backend: Backend, method: str, steps: int, number: int, photo: int | None = None) -> EditJob:
    """An edit by ``method``; the prompts depend on ``number``, and so does the photo unless it is given."""
    ddim = DdimInversion()
    options: dict[str, tuple[EditOptions, EdictInversion | DdimInversion | None]] = {
        "edict": (EdictEdit(), EdictInversion()),
        "ddim": (DdimEdit(), ddim),
        "diffedit": (DiffEdit(None, 0.5, 10, 0.5, ""), ddim),
        "sdedit": (SdEdit(STRENGTH, steps), None),
        "content_injection": (_injection(), ddim),
    }
    chosen, inverts_by = options[method]
    inversion = None if inverts_by is None else inversion_of(inverts_by, steps)
    companion = None
    if method == "content_injection":
        content = InversionOptions(DdimInversion(features=("mid",)), steps, STRENGTH, 1.0, "")
        companion = Companion(Photo(_photo(backend, number + 1000)), content)
    source = Photo(_photo(backend, number if photo is None else photo))
    words = f"a picture of thing number {number}"
    return EditJob(backend.facts.info.id, source, inversion, chosen, words, "", GUIDANCE, number, companion)


def inversion_of(method: EdictInversion | DdimInversion, steps: int) -> InversionOptions:
    """Options of an inversion, with a source prompt."""
    return InversionOptions(method, steps, STRENGTH, GUIDANCE, "a photo")


def round_trip(backend: Backend, steps: int, number: int) -> InvertJob:
    """EDICT there and back; the result says how far it ends from where it began."""
    options = inversion_of(EdictInversion(), steps)
    return InvertJob(backend.facts.info.id, Photo(_photo(backend, number)), options, verify=True)


def mix(backend: Backend, steps: int, count: int) -> list[Job]:
    """So many edits by all methods in turn."""
    return [edit(backend, METHODS[number % len(METHODS)], steps, number) for number in range(count)]


def random_mix(backend: Backend, steps: int, count: int) -> list[Job]:
    """So many edits by random methods, of half to all of ``steps``."""
    random = Random(1)
    return [
        edit(backend, random.choice(METHODS), random.randint(max(2, steps // 2), steps), 500 + number)
        for number in range(count)
    ]


def arrivals(count: int, per_s: float) -> list[float]:
    """Times at which so many jobs arrive by chance, on average ``per_s`` each second."""
    random, at, times = Random(2), 0.0, []
    for _ in range(count):
        at += random.expovariate(per_s)
        times.append(at)
    return times


def _injection() -> ContentInjection:
    return ContentInjection(
        weight=0.3, calibration=0.0, region=None, injection_end=0.4, every=1, boosting_start=0.0,
        interpolation=Interpolation.SLERP, sites=("mid",),
    )  # fmt: skip


def _photo(backend: Backend, number: int) -> Picture:
    """Random pixels that are alike over eight of them, at the model's own size."""
    info = backend.facts.info
    coarse = np.random.default_rng(number).integers(0, 256, (info.height // 8, info.width // 8, 3), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)
