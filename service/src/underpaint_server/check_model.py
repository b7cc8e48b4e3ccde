"""``underpaint-server check-model DIRECTORY``: whether a checkpoint can be served, what it is, and how fast it is.

Loads the checkpoint as the server does and runs the engine's own loop in this process, without a socket. Facts go to
stdout, progress and errors to stderr.
"""

import queue
import resource
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from shlex import quote
from typing import Any

import numpy as np
import structlog
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from underpaint.v1 import edit_service_pb2

from underpaint_server.backends import load
from underpaint_server.backends.protocol import Backend, DeviceLost
from underpaint_server.engine.loop import Engine
from underpaint_server.engine.messages import Ended, Order, Passed, Report, StartJob, Stop
from underpaint_server.engine.run import now
from underpaint_server.errors import (
    Bug,
    FieldInvalid,
    MethodDisabled,
    ModelNotReady,
    OutOfMemory,
    UnderpaintError,
    cause_of,
)
from underpaint_server.jobs import (
    EditJob,
    Inversion,
    InversionOptions,
    Inverted,
    InvertJob,
    Job,
    ModelInfo,
    Photo,
    Picture,
    Priority,
)
from underpaint_server.methods.ddim.options import DdimInversion
from underpaint_server.methods.edict.options import EdictInversion
from underpaint_server.models import tensors
from underpaint_server.models.facts import Facts
from underpaint_server.plans import total_rows
from underpaint_server.rows import Batch, Decode, Encode
from underpaint_server.rpc.requests.edit import edit_draft
from underpaint_server.settings import EMBEDDED_MODEL, CheckSettings, Settings
from underpaint_server.telemetry import configure_logging

STEPS = 5
"""Steps of the EDICT round trip, at strength 1."""
TIMED_STEPS = 3
"""Passes of each size that are run for timing; the first is not counted."""
ENOUGH_S = 60.0
"""Larger passes are not timed after a size that took longer than this, in seconds."""
LINE_EVERY_S = 10.0
"""Shortest time between two lines of progress where stderr is not a terminal, in seconds."""
EXACT = 1e-8
"""Largest latent error of a round trip that counts as exact."""
FAITHFUL_DB = 20.0
"""PSNR of the autoencoder's reconstruction below which a warning is printed, in dB."""
PROMPT = "a ball on a table"
"""Prompt of the test image, see :func:`ball`."""


def main(settings: CheckSettings) -> int:
    """Run the check; returns the exit status, 1 if the checkpoint cannot be served."""
    configure_logging(settings.log_level)
    structlog.configure(
        processors=[structlog.processors.format_exc_info, _as_note],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    try:
        check(settings)
    except UnderpaintError as error:
        return _refuse(error)
    except DeviceLost as error:
        return _refuse(Bug(f"the device failed and needs a new process: {error}"))
    except Exception as error:
        return _refuse(Bug(f"{type(error).__name__}: {error}"))
    return 0


def check(settings: CheckSettings) -> None:
    """Load the checkpoint, print its facts, and test it; raises :class:`UnderpaintError` if it cannot be served."""
    name = settings.model_id
    begin = time.monotonic()
    backend = load(settings.directory, name, settings)
    _print_fact("model", settings.directory or f"{EMBEDDED_MODEL}, embedded")
    for label, value in _facts(backend.facts):
        _print_fact(label, value)
    _print_fact("ready after", f"{time.monotonic() - begin:.1f} s")
    for label, value in _tests(backend, settings):
        _print_fact(label, value)
    _print_fact("serve it with", _command(name, settings))


def _command(name: str, settings: CheckSettings) -> str:
    if "," in settings.directory:
        return "a path without a comma, because commas separate models: rename the directory"
    model = f" --models {quote(f'{name}={settings.directory}')}" if settings.directory else ""
    return f"underpaint-server{model} --dtype {settings.dtype} --device {settings.device}"


# --- facts ------------------------------------------------------------------------------------------------------


def _facts(facts: Facts) -> Iterator[tuple[str, str]]:
    info, about = facts.info, facts.about
    channels, height, width = facts.latent_shape(info.width, info.height)
    yield "family", f"{about.family}, predicts {about.prediction}"
    yield "image", f"{info.width} x {info.height} px; other sizes in multiples of {info.size_multiple}"
    yield "latents", f"{channels} x {height} x {width}, {facts.vae_scale} px each"
    yield "schedule", f"{len(facts.schedule.alphas_cumprod)} levels, {info.default_steps} steps by default"
    yield "text", f"{info.prompt_tokens} tokens, start and end included" if info.prompt_tokens else "none"
    if about.parameters:
        yield "parameters", ", ".join(f"{part} {_short(count)}" for part, count in about.parameters.items())
    yield "runs in", f"{info.dtype} on {facts.device}, {torch.get_num_threads()} CPU threads"
    yield "methods", ", ".join(info.methods)
    passes = f"of {info.batch_class} rows" if info.batch_class else "of any size, which does not change a bit"
    yield "passes", passes
    yield "digest", info.digest
    yield "fingerprint", info.fingerprint


# --- tests ------------------------------------------------------------------------------------------------------


def _tests(backend: Backend, settings: Settings) -> Iterator[tuple[str, str]]:
    info = backend.facts.info
    photo = Photo(ball(info.width, info.height))
    yield "encode, decode", _through_autoencoder(backend, photo)
    yield "EDICT", _round_trip(backend, settings, photo)
    pace = _pace(backend, settings, photo)
    yield "network row", ", ".join(f"{seconds:.2g} s at {size} rows a pass" for size, seconds in pace.items())
    yield "an edit", _edits(info, settings, alone_s=pace[min(pace)], busy_s=min(pace.values()))
    yield "memory", _memory(backend)


def _through_autoencoder(backend: Backend, photo: Photo) -> str:
    latents = _predict(backend, Encode(tensors.image(photo.pixels).to(backend.facts.device)))
    image = _predict(backend, Decode(latents))
    ratio = tensors.psnr_db(tensors.picture(image), photo.pixels)
    if ratio < FAITHFUL_DB:
        _print_note(
            f"warning: the autoencoder alone has a PSNR of {ratio:.1f} dB; check that it belongs to this network"
        )
    return "the same pixels" if ratio == inf else f"PSNR {ratio:.1f} dB: no edit comes closer to its photo"


def _round_trip(backend: Backend, settings: Settings, photo: Photo) -> str:
    reads_text = backend.facts.info.prompt_tokens > 0
    guidance, prompt = (3.0, PROMPT) if reads_text else (1.0, "")
    options = InversionOptions(EdictInversion(), STEPS, 1.0, guidance, prompt)
    job = InvertJob(backend.facts.info.id, photo, options, verify=True)
    (inversion,), passes = _run(backend, settings, [job], "EDICT round trip")
    error = inversion.reconstruction_max_abs_error
    assert error is not None
    if not error <= EXACT:
        raise ModelNotReady(
            f"the EDICT round trip has a latent error of {error:.1e}: the network does not give the same bits for the "
            "same rows here; try --exact-batching pinned, or another --dtype"
        )
    seconds = sum(passed.duration_s for passed in passes)
    return f"round trip of {STEPS} steps at guidance {guidance:g}: latent error {error:.1e}, {seconds:.1f} s"


def _pace(backend: Backend, settings: Settings, photo: Photo) -> dict[int, float]:
    """Rows of a pass, without padding -> seconds per row, for 2, 4, 8 ... rows up to the largest pass."""
    info = backend.facts.info
    largest = info.batch_class or settings.max_batch_size
    options = InversionOptions(DdimInversion(), TIMED_STEPS, 1.0, 1.0, "")
    job = InvertJob(info.id, photo, options, verify=False)
    pace: dict[int, float] = {}
    size = 2
    while size <= largest:
        begin = now()
        try:
            _, passes = _run(backend, settings, [job] * size, f"passes of {size} rows")
        except OutOfMemory:
            if not pace:
                raise
            _print_note(
                f"warning: passes of {size} rows do not fit the device; serve with --max-batch-size {size // 2}"
            )
            break
        whole = [passed.duration_s for passed in passes if sum(passed.rows_by_method.values()) == size]
        if len(whole) < 2:  # out of memory: the engine split the passes
            _print_note(
                f"warning: passes of {size} rows do not fit the device; serve with --max-batch-size {size // 2}"
            )
            break
        pace[size] = min(whole[1:]) / size
        if now() - begin > ENOUGH_S:
            break
        size *= 2
    return pace


def _edits(info: ModelInfo, settings: Settings, *, alone_s: float, busy_s: float) -> str:
    """Estimated seconds of an edit by each method that needs only an image and a prompt, at the server's defaults."""
    jobs = {name: job for name in info.methods if (job := _default_edit(name, info, settings)) is not None}
    estimates = [f"{name} {_seconds(total_rows(job) * alone_s)}" for name, job in jobs.items()]
    gain = f"; up to {alone_s / busy_s:.1f} times as many when busy" if busy_s < alone_s else ""
    return f"at {info.default_steps} steps, alone, about " + ", ".join(estimates) + gain


def _default_edit(name: str, info: ModelInfo, settings: Settings) -> EditJob | None:
    """The job of a request that sets only the method, with the server's defaults; None if the method needs more."""
    request = edit_service_pb2.EditRequest(target_prompt=PROMPT if info.prompt_tokens else "")
    request.image.SetInParent()
    request.inversion_parameters.SetInParent()
    getattr(request, name).SetInParent()
    try:
        draft = edit_draft(request, info, settings)
    except (FieldInvalid, MethodDisabled):
        return None
    guidance = draft.guidance_scale
    if guidance is None:
        guidance = draft.inversion.guidance_scale if draft.inversion else 1.0
    photo = Photo(np.zeros((info.height, info.width, 3), np.uint8))
    return EditJob(info.id, photo, draft.inversion, draft.method, PROMPT, "", guidance, 0)


def _memory(backend: Backend) -> str:
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    on_device = backend.memory_bytes()
    parts = [f"{_short(on_device[kind])}B {kind}" for kind in ("peak", "total") if kind in on_device]
    return f"{_short(process)}B peak of this process" + (f"; on the device {', '.join(parts)}" if parts else "")


# --- the engine -------------------------------------------------------------------------------------------------


def _predict(backend: Backend, row: Encode | Decode) -> Any:
    """The answer to one row of the autoencoder, in a pass of its own."""
    shape = row.image.shape if isinstance(row, Encode) else row.latents.shape
    size = backend.batch_class(type(row), tuple(shape)) or backend.minimum(type(row))
    with torch.inference_mode():
        return backend.predict(Batch([row], size))[0]


@dataclass(slots=True)
class _Collector:
    """Collects the engine's reports and stops the engine when all jobs have ended."""

    jobs: int
    inbox: "queue.SimpleQueue[Order]"
    advance: Callable[[int], None]
    outcomes: dict[int, Any]
    passes: list[Passed]

    def __call__(self, report: Report) -> None:
        if isinstance(report, Passed) and report.is_network:
            self.passes.append(report)
            self.advance(sum(report.rows_by_method.values()))
        if isinstance(report, Ended):
            self.outcomes[report.id] = report.outcome
            if len(self.outcomes) == self.jobs:
                self.inbox.put(Stop())


def _run(
    backend: Backend, settings: Settings, jobs: Sequence[Job], caption: str
) -> tuple[list[Inversion], list[Passed]]:
    """Run inversion jobs at the same time; their inversions and the network passes.

    Raises the error of the first job that failed. ``caption`` labels the progress bar.
    """
    inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
    for id_, job in enumerate(jobs):
        inbox.put(StartJob(id_, job, Priority.NORMAL, now(), None, 0))
    with _progress(caption, sum(total_rows(job) for job in jobs)) as advance:
        collector = _Collector(len(jobs), inbox, advance, {}, [])
        Engine({backend.facts.info.id: backend}, inbox, collector, settings.max_batch_size, settings.learn_share).run()
    for outcome in collector.outcomes.values():
        if isinstance(outcome, UnderpaintError):
            raise outcome
    inversions = [outcome.inversion for outcome in collector.outcomes.values() if isinstance(outcome, Inverted)]
    return inversions, collector.passes


# --- test image and output --------------------------------------------------------------------------------------


def ball(width: int, height: int) -> Picture:
    """The test image, (height, width, 3): a lit ball on a table, with smooth shading, a sharp edge, a soft shadow."""
    y, x = np.mgrid[:height, :width] + 0.5
    side, floor = min(width, height), 0.62 * height
    wall = np.array([0.62, 0.70, 0.80]) * (0.7 + 0.3 * y / height)[..., None]
    table = np.array([0.55, 0.38, 0.24]) * (0.6 + 0.5 * (y - floor) / (height - floor))[..., None]
    scene = np.where((y > floor)[..., None], table, wall)
    across, down = (x - 0.5 * width) / (0.27 * side), (y - 0.55 * height) / (0.27 * side)
    shadow = np.exp(-2.5 * (((across - 0.35) / 1.2) ** 2 + ((down - 0.95) / 0.35) ** 2))
    scene = scene * (1 - 0.6 * shadow * (y > floor))[..., None]
    depth = np.sqrt(np.clip(1 - across**2 - down**2, 0, None))
    light = np.clip(-0.5 * across - 0.6 * down + 0.62 * depth, 0, None)
    lit = np.array([0.85, 0.25, 0.2]) * (0.15 + 0.85 * light)[..., None] + (0.6 * light**40)[..., None]
    scene = np.where((depth > 0)[..., None], lit, scene)
    pixels: Picture = (255 * scene.clip(0, 1)).round().astype(np.uint8)
    return pixels


@contextmanager
def _progress(caption: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of ``total`` rows are done; the function that is yielded is told of each pass's rows.

    A terminal gets a bar, anything else a line at the start and then at most one every :data:`LINE_EVERY_S`.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(caption, total=total)
            yield lambda rows: bar.advance(task, rows)
        return
    _print_note(f"{caption}: {total} rows")
    begin = last_line = now()
    done = 0

    def advance(rows: int) -> None:
        nonlocal done, last_line
        done += rows
        if now() - last_line >= LINE_EVERY_S and done < total:
            last_line = now()
            _print_note(f"{caption}: {done} of {total} rows after {_seconds(last_line - begin)}")

    yield advance


def _print_fact(label: str, value: str) -> None:
    print(f"{label:<15} {value}", flush=True)


def _as_note(_logger: object, _level: str, line: MutableMapping[str, Any]) -> str:
    """A log line as a note for people."""
    parts = [line.get("note") or line["event"], line.get("error"), line.get("exception")]
    return "underpaint-server: " + "\n".join(str(part) for part in parts if part)


def _print_note(line: str) -> None:
    print(f"underpaint-server: {line}", file=sys.stderr, flush=True)


def _refuse(error: UnderpaintError) -> int:
    _print_note(f"{error.reason}: {error.message}")
    if cause := cause_of(error):
        _print_note(f"cause: {cause}")
    _print_note("this model cannot be served; the README lists under 'Your own weights' which models can")
    return 1


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"


def _short(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
