"""``underpaint-server check-model DIRECTORY``: whether a checkpoint can be served, what it is, and how fast it is.

Loads the checkpoint as the server does and runs the engine's own loop in this process, without a socket. Facts go to
stdout, progress and errors to stderr.
"""

import resource
import sys
import time
from collections.abc import Iterator
from math import inf
from shlex import quote
from typing import Any

import numpy as np
import torch
from underpaint.v1 import edit_service_pb2

from underpaint_server import offline
from underpaint_server.backends import load
from underpaint_server.backends.exactness import Survey
from underpaint_server.backends.protocol import Backend
from underpaint_server.engine.run import now
from underpaint_server.errors import FieldInvalid, MethodDisabled, ModelNotReady, OutOfMemory
from underpaint_server.jobs import EditJob, InversionOptions, InvertJob, ModelInfo, Photo
from underpaint_server.methods.ddim.options import DdimInversion
from underpaint_server.methods.edict.options import EdictInversion
from underpaint_server.models import tensors
from underpaint_server.models.facts import Facts
from underpaint_server.plans import total_rows
from underpaint_server.rows import Batch, Decode, Encode
from underpaint_server.rpc.requests.edit import edit_draft
from underpaint_server.settings import EMBEDDED_MODEL, CheckSettings, Settings

STEPS = 5
"""Steps of the EDICT round trip, at strength 1; fewer if they would take more than :data:`ENOUGH_S`."""
TIMED_STEPS = 3
"""Passes of each size that are run for timing; the first is not counted."""
ENOUGH_S = 60.0
"""Time that the round trip may take, in seconds. Larger passes are not timed after a size that took longer."""
FAITHFUL_DB = 20.0
"""PSNR of the autoencoder's reconstruction below which a warning is printed, in dB."""
PROMPT = "a ball on a table"
"""Prompt of the test image, see :func:`offline.ball`."""


def main(settings: CheckSettings) -> int:
    """Run the check; returns the exit status, 1 if the checkpoint cannot be served."""
    return offline.status(settings, lambda: check(settings))


def check(settings: CheckSettings) -> int:
    """Load the checkpoint, print its facts, and test it; raises :class:`UnderpaintError` if it cannot be served."""
    name = settings.model_id
    begin = time.monotonic()
    backend = load(settings.directory, name, settings, Survey(progress=offline.progress))
    offline.print_fact("model", settings.directory or f"{EMBEDDED_MODEL}, embedded")
    for label, value in _facts(backend.facts):
        offline.print_fact(label, value)
    offline.print_fact("ready after", f"{time.monotonic() - begin:.1f} s")
    for label, value in _tests(backend, settings):
        offline.print_fact(label, value)
    offline.print_fact("serve it with", _command(name, settings))
    return 0


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
    yield "runs in", f"{info.dtype} on {facts.device} by {info.backend}, {torch.get_num_threads()} CPU threads"
    yield "methods", ", ".join(info.methods)
    yield "passes", offline.PASSES[info.exactness].format(info.batch_class)
    yield "digest", info.digest
    yield "fingerprint", info.fingerprint


# --- tests ------------------------------------------------------------------------------------------------------


def _tests(backend: Backend, settings: Settings) -> Iterator[tuple[str, str]]:
    info = backend.facts.info
    photo = Photo(offline.ball(info.width, info.height))
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
        offline.print_note(
            f"warning: the autoencoder alone has a PSNR of {ratio:.1f} dB; check that it belongs to this network"
        )
    return "the same pixels" if ratio == inf else f"PSNR {ratio:.1f} dB: no edit comes closer to its photo"


def _round_trip(backend: Backend, settings: Settings, photo: Photo) -> str:
    reads_text = backend.facts.info.prompt_tokens > 0
    guidance, prompt = (3.0, PROMPT) if reads_text else (1.0, "")
    steps = _affordable_steps(backend)
    options = InversionOptions(EdictInversion(), steps, 1.0, guidance, prompt)
    job = InvertJob(backend.facts.info.id, photo, options, verify=True)
    (inversion,), passes = offline.run(backend, settings, [job], "EDICT round trip")
    error = inversion.reconstruction_max_abs_error
    assert error is not None
    if not error <= offline.EXACT:
        raise ModelNotReady(
            f"the EDICT round trip has a latent error of {error:.1e}: the network does not give the same bits for the "
            "same rows here; try --exact-batching pinned, or another --dtype"
        )
    seconds = sum(passed.duration_s for passed in passes)
    return f"round trip of {steps} steps at guidance {guidance:g}: latent error {error:.1e}, {seconds:.1f} s"


def _affordable_steps(backend: Backend) -> int:
    """Steps of the round trip; each is four passes, two up and two back."""
    if backend.verdict is None:
        return STEPS
    pass_s = next(iter(backend.verdict.measured.pass_seconds.values()))
    return max(1, min(STEPS, int(ENOUGH_S / (4 * pass_s))))


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
            _, passes = offline.run(backend, settings, [job] * size, f"passes of {size} rows")
        except OutOfMemory:
            if not pace:
                raise
            offline.print_note(
                f"warning: passes of {size} rows do not fit the device; serve with --max-batch-size {size // 2}"
            )
            break
        whole = [passed.duration_s for passed in passes if sum(passed.rows_by_method.values()) == size]
        if len(whole) < 2:  # out of memory: the engine split the passes
            offline.print_note(
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
    estimates = [f"{name} {offline.seconds(total_rows(job) * alone_s)}" for name, job in jobs.items()]
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


def _predict(backend: Backend, row: Encode | Decode) -> Any:
    """The answer to one row of the autoencoder, in a pass of its own."""
    shape = row.image.shape if isinstance(row, Encode) else row.latents.shape
    size = backend.batch_class(type(row), tuple(shape)) or backend.minimum(type(row))
    with torch.inference_mode():
        return backend.predict(Batch([row], size))[0]


def _short(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
