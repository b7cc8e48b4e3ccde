"""``underpaint-server check-model DIRECTORY``: whether a checkpoint can be served, what it is, and how fast.

Loads it as the server does and runs the engine's own loop in this process, without a socket. Facts go to stdout,
progress and errors to stderr.
"""

import queue
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from underpaint.v1 import edit_service_pb2

from underpaint_server.backends import load
from underpaint_server.backends.protocol import Backend, DeviceLost
from underpaint_server.engine.loop import Engine
from underpaint_server.engine.messages import Ended, Order, Passed, Report, StartJob, Stop
from underpaint_server.engine.run import now
from underpaint_server.errors import Bug, FieldInvalid, MethodDisabled, ModelNotReady, OutOfMemory, UnderpaintError
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
"""Of the schedule that the proof inverts and runs back; all are used."""
TIMED_STEPS = 3
"""Passes of each size that are timed; the first is left out."""
ENOUGH_S = 60.0
"""No larger passes are timed once one size has taken so long."""
EXACT = 1e-8
"""Largest latent error of a round trip that counts as exact."""
FAITHFUL_DB = 20.0
"""An autoencoder that comes back farther off than this deserves a warning."""
PROMPT = "a ball on a table"


def main(settings: CheckSettings) -> int:
    """Run the check; the exit status."""
    configure_logging(settings.log_level)
    try:
        check(settings)
    except UnderpaintError as error:
        return _refuse(error)
    except DeviceLost as error:
        return _refuse(Bug(f"the device computes nothing any more: {error}"))
    except Exception as error:
        return _refuse(Bug(f"{type(error).__name__}: {error}"))
    return 0


def check(settings: CheckSettings) -> None:
    """Load the checkpoint, say what it is, and prove it; raises :class:`UnderpaintError` where it cannot be served."""
    name = re.sub(r"[^\w.-]+", "-", Path(settings.directory).name).strip("-") or EMBEDDED_MODEL
    _tell(f"reading {settings.directory or EMBEDDED_MODEL} ...")
    begin = time.monotonic()
    backend = load(settings.directory, name, settings)
    _say("model", settings.directory or f"{EMBEDDED_MODEL}, embedded")
    for label, value in _facts(backend.facts):
        _say(label, value)
    _say("ready after", f"{time.monotonic() - begin:.1f} s")
    for label, value in _proofs(backend, settings):
        _say(label, value)
    _say("serve it with", _command(name, settings))


def _command(name: str, settings: CheckSettings) -> str:
    if "," in settings.directory:
        return "a path without a comma, which separates models: rename the directory"
    model = f" --models {quote(f'{name}={settings.directory}')}" if settings.directory else ""
    return f"underpaint-server{model} --dtype {settings.dtype} --device {settings.device}"


# --- what it is -------------------------------------------------------------------------------------------------


def _facts(facts: Facts) -> Iterator[tuple[str, str]]:
    info, about = facts.info, facts.about
    channels, height, width = facts.latent_shape(info.width, info.height)
    yield "family", f"{about.family}, predicts {about.prediction}"
    yield "picture", f"{info.width} x {info.height} px; other sizes in multiples of {info.size_multiple}"
    yield "latents", f"{channels} x {height} x {width}, {facts.vae_scale} px each"
    yield "schedule", f"{len(facts.schedule.alphas_cumprod)} levels, {info.default_steps} steps by default"
    yield "text", f"{info.prompt_tokens} tokens, markers included" if info.prompt_tokens else "none"
    if about.parameters:
        yield "parameters", ", ".join(f"{part} {_short(count)}" for part, count in about.parameters.items())
    yield "runs in", f"{info.dtype} on {facts.device}, {torch.get_num_threads()} CPU threads"
    yield "methods", ", ".join(info.methods)
    pinned = f"run in passes of {info.batch_class} rows" if info.batch_class else "share passes of any size"
    yield "exact jobs", pinned
    yield "digest", info.digest
    yield "fingerprint", info.fingerprint


# --- whether it works -------------------------------------------------------------------------------------------


def _proofs(backend: Backend, settings: Settings) -> Iterator[tuple[str, str]]:
    info = backend.facts.info
    photo = Photo(ball(info.width, info.height))
    yield "encode, decode", _through_autoencoder(backend, photo)
    yield "EDICT", _there_and_back(backend, settings, photo)
    pace = _pace(backend, settings, photo)
    yield "network row", ", ".join(f"{seconds:.2g} s in passes of {size}" for size, seconds in pace.items())
    yield "an edit", _edits(info, settings, alone_s=pace[min(pace)], busy_s=min(pace.values()))
    yield "memory", _memory(backend)


def _through_autoencoder(backend: Backend, photo: Photo) -> str:
    latents = _ask(backend, Encode(tensors.image(photo.pixels).to(backend.facts.device)))
    tensors.check_finite(latents)
    image = _ask(backend, Decode(latents))
    ratio = tensors.psnr_db(tensors.picture(image), photo.pixels)
    if ratio < FAITHFUL_DB:
        _tell(f"warning: the autoencoder alone comes back at {ratio:.1f} dB; is it the one of this network?")
    return "the same pixels" if ratio == inf else f"PSNR {ratio:.1f} dB: no edit comes closer to its photo"


def _there_and_back(backend: Backend, settings: Settings, photo: Photo) -> str:
    reads_text = backend.facts.info.prompt_tokens > 0
    guidance, prompt = (3.0, PROMPT) if reads_text else (1.0, "")
    options = InversionOptions(EdictInversion(), STEPS, 1.0, guidance, prompt)
    job = InvertJob(backend.facts.info.id, photo, options, verify=True)
    (made,), passes = _run(backend, settings, [job], "EDICT, there and back")
    error = made.reconstruction_max_abs_error
    assert error is not None
    if not error <= EXACT:
        raise ModelNotReady(
            f"EDICT came back with a latent error of {error:.1e}: the network does not give equal bits twice here; "
            "try --exact-batching pinned, or another --dtype"
        )
    seconds = sum(passed.duration_s for passed in passes)
    return f"{STEPS} steps there and back at guidance {guidance:g}: latent error {error:.1e}, {seconds:.1f} s"


def _pace(backend: Backend, settings: Settings, photo: Photo) -> dict[int, float]:
    """Rows of a pass -> seconds a row, for passes of 2, 4, 8 ... rows."""
    info = backend.facts.info
    options = InversionOptions(DdimInversion(), TIMED_STEPS, 1.0, 1.0, "")
    job = InvertJob(info.id, photo, options, verify=False)
    pace: dict[int, float] = {}
    size = 2
    while size <= settings.max_batch_size:
        begin = now()
        try:
            _, passes = _run(backend, settings, [job] * size, f"passes of {size} rows")
        except OutOfMemory:
            if not pace:
                raise
            _tell(f"warning: passes of {size} rows do not fit the device; serve with --max-batch-size {size // 2}")
            break
        whole = [passed.duration_s for passed in passes if sum(passed.rows_by_method.values()) == size]
        if len(whole) < 2:  # the device was full: the engine made smaller passes of it
            _tell(f"warning: passes of {size} rows do not fit the device; serve with --max-batch-size {size // 2}")
            break
        pace[size] = min(whole[1:]) / size
        if now() - begin > ENOUGH_S:
            break
        size *= 2
    return pace


def _edits(info: ModelInfo, settings: Settings, *, alone_s: float, busy_s: float) -> str:
    """Seconds of an edit of each method that needs no more than a picture and a text, at the server's defaults."""
    costs = {name: job for name in info.methods if (job := _default_edit(name, info, settings)) is not None}
    each = [f"{name} {_seconds(total_rows(job) * alone_s)}" for name, job in costs.items()]
    gain = f"; up to {alone_s / busy_s:.1f} times as many when busy" if busy_s < alone_s else ""
    return f"at {info.default_steps} steps, alone, about " + ", ".join(each) + gain


def _default_edit(name: str, info: ModelInfo, settings: Settings) -> EditJob | None:
    """What the server makes of a request that says nothing but the method; None where it wants more than that."""
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
    return f"{_short(process)}B of this process at most" + (f"; on the device {', '.join(parts)}" if parts else "")


# --- the engine -------------------------------------------------------------------------------------------------


def _ask(backend: Backend, row: Encode | Decode) -> Any:
    """The answer to one row that is not the network's."""
    shape = row.image.shape if isinstance(row, Encode) else row.latents.shape
    size = backend.batch_class(type(row), tuple(shape)) or backend.minimum(type(row))
    with torch.inference_mode():
        return backend.predict(Batch([row], size))[0]


@dataclass(slots=True)
class _Ear:
    """Hears what the engine reports and stops it when all jobs have ended."""

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


def _run(backend: Backend, settings: Settings, jobs: Sequence[Job], what: str) -> tuple[list[Inversion], list[Passed]]:
    """Inversions of all jobs at once, and the network's passes; raises the error of the first job that failed."""
    inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
    for id_, job in enumerate(jobs):
        inbox.put(StartJob(id_, job, Priority.NORMAL, now(), None, 0))
    with _bar() as bar:
        task = bar.add_task(what, total=sum(total_rows(job) for job in jobs))
        ear = _Ear(len(jobs), inbox, lambda rows: bar.advance(task, rows), {}, [])
        Engine({backend.facts.info.id: backend}, inbox, ear, settings.max_batch_size, settings.learn_share).run()
    for outcome in ear.outcomes.values():
        if isinstance(outcome, UnderpaintError):
            raise outcome
    made = [outcome.inversion for outcome in ear.outcomes.values() if isinstance(outcome, Inverted)]
    return made, ear.passes


# --- words and pictures -----------------------------------------------------------------------------------------


def ball(width: int, height: int) -> Picture:
    """A lit ball on a table in front of a wall, (height, width, 3): smooth shading, a sharp edge, a soft shadow."""
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


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))


def _say(label: str, value: str) -> None:
    print(f"{label:<15} {value}", flush=True)


def _tell(line: str) -> None:
    print(f"underpaint-server: {line}", file=sys.stderr, flush=True)


def _refuse(error: UnderpaintError) -> int:
    _tell(f"{error.reason}: {error.message}")
    _tell("this model cannot be served; what can be is in the README under 'Your own weights'")
    return 1


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"


def _short(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
