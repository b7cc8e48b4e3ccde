"""``underpaint-server self-test DIRECTORY``: whether a model's results have the same bits at any load on this machine.

Measures completely what a server measures as far as its time allows, keeps it for later starts, and proves it with the
engine's own loop in this process. Facts go to stdout, progress and errors to stderr.
"""

import numpy as np

from underpaint_server import cache, offline
from underpaint_server.backends import load
from underpaint_server.backends.exactness import Survey
from underpaint_server.backends.invariance import Comparison
from underpaint_server.backends.protocol import Backend
from underpaint_server.jobs import Exactness, Inversion, InversionOptions, InvertJob, Photo
from underpaint_server.methods.ddim.options import DdimInversion
from underpaint_server.methods.edict.options import EdictInversion
from underpaint_server.settings import EMBEDDED_MODEL, SelfTestSettings

STEPS = 5
"""Steps of the EDICT round trips, at strength 1."""
COMPANY = ((1.0, 9), (3.0, 4), (1.0, 3), (3.0, 8), (1.0, 6), (3.0, 2))
"""Guidance scale and steps of the jobs that run beside one of them. They end one after another, so that the sizes of
passes vary."""


def main(settings: SelfTestSettings) -> int:
    """Run the test; returns the exit status, 1 if results would not be exact or the model cannot be served."""
    return offline.status(settings, lambda: _test(settings))


def _test(settings: SelfTestSettings) -> int:
    backend = load(settings.directory, settings.model_id, settings, Survey(offline.progress, complete=True))
    info, verdict = backend.facts.info, backend.verdict
    assert verdict is not None
    measured, key = verdict.measured, verdict.measured.key
    offline.print_fact("model", settings.directory or f"{EMBEDDED_MODEL}, embedded")
    offline.print_fact("runs in", f"{key.dtype} by {key.backend} {key.version}, {key.threads or 'any'} CPU threads")
    offline.print_fact("device", key.device or str(backend.facts.device))
    offline.print_fact("any size", _described(measured.any_size, f"{key.minimum} to {key.maximum}"))
    if measured.fallback is not None:
        sizes = "one row each" if measured.fallback_class is None else str(measured.fallback_class)
        offline.print_fact("fixed size", _described(measured.fallback, sizes))
    paces = ", ".join(f"{size / taken:.3g} at {size}" for size, taken in measured.pass_seconds.items())
    offline.print_fact("rows a second", f"{paces} rows a pass")
    if verdict.other_class is not None:
        use = "at other image sizes" if verdict.native_class is None else "at every image size"
        offline.print_fact("batch class", f"{verdict.other_class} rows, {use}")
    alone, together = _round_trips(backend, settings)
    errors = [inversion.reconstruction_max_abs_error or 0.0 for inversion in (alone, together)]
    offline.print_fact("EDICT", f"latent error {errors[0]:.1e} alone, {errors[1]:.1e} beside {len(COMPANY)} other jobs")
    is_equal = all(np.array_equal(array, together.arrays[name]) for name, array in alone.arrays.items())
    offline.print_fact("its bits", "the same alone and beside others" if is_equal else "other ones beside other jobs")
    offline.print_fact("passes", offline.PASSES[info.exactness].format(info.batch_class))
    is_exact = info.exactness is not Exactness.INEXACT and is_equal and max(errors) <= offline.EXACT
    offline.print_fact("verdict", "exact" if is_exact else "not exact: use another --backend, --dtype or --device")
    directory = cache.directory(settings)
    offline.print_fact("kept in", str(directory) if directory else "nothing: no cache directory can be used")
    return 0 if is_exact else 1


def _described(comparison: Comparison | None, sizes: str) -> str:
    if comparison is None:
        return f"passes of {sizes} rows do not fit the device's memory; use a smaller --max-batch-size"
    repeatable = "" if comparison.repeatable else "; a repeated pass has other bits"
    round_trip = "" if comparison.round_trip is None else f"; round trip {comparison.round_trip:.1e}"
    return (
        f"{comparison.unequal} of {comparison.compared} rows have other bits in passes of {sizes} rows, at most by"
        f" {comparison.largest:.1e}{repeatable}{round_trip}; {comparison.evaluations} passes,"
        f" {offline.seconds(comparison.seconds)}"
    )


def _round_trips(backend: Backend, settings: SelfTestSettings) -> tuple[Inversion, Inversion]:
    """An EDICT inversion with its way back, alone and beside other jobs."""
    info = backend.facts.info
    photo = Photo(offline.ball(info.width, info.height))
    reads_text = info.prompt_tokens > 0
    guidance, prompt = (3.0, "a ball on a table") if reads_text else (1.0, "")
    job = InvertJob(info.id, photo, InversionOptions(EdictInversion(), STEPS, 1.0, guidance, prompt), verify=True)
    options = [InversionOptions(DdimInversion(), k, 1.0, scale if reads_text else 1.0, prompt) for scale, k in COMPANY]
    others = [InvertJob(info.id, photo, option, verify=False) for option in options]
    (alone,), _ = offline.run(backend, settings, [job], "EDICT round trip alone")
    (together, *_), _ = offline.run(backend, settings, [job, *others], "EDICT round trip beside other jobs")
    return alone, together
