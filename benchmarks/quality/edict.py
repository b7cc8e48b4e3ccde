"""EDICT against DDIM: reconstruction errors, and the quality of edits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, product
from statistics import median

import numpy as np
from underpaint import DdimInversion, EdictInversion
from underpaint.methods import InversionMethod

from benchmarks import served
from benchmarks.cases import Case, psnr_db
from benchmarks.quality import edits, figures
from benchmarks.quality.bench import Bench
from benchmarks.quality.section import Section, Sheet
from benchmarks.report import Table

GUIDANCES = (1.0, 3.0, 7.0)
STEPS = (20, 50)
INVERSIONS: dict[str, InversionMethod] = {"EDICT": EdictInversion(), "DDIM": DdimInversion()}
STRENGTH = 0.8
TIMED = 3
"""Cases whose edits are timed, one after another."""
EXACT = 1e-8
"""Largest latent error that counts as exact."""
ABOUT = (
    "EDICT promises that an inverted photo comes back exactly, and nothing about edits; both are shown beside DDIM's. "
    "Reconstruction: strength 0.8, the source's own caption, the same guidance there and back. Edits: {steps} steps; "
    "DDIM and EDICT inverted with the source's caption and run back with the target's, strength 0.8, guidance 3; "
    "SDEdit guidance 3; DiffEdit strength 0.8, guidance 5, mask strength 0.5, threshold 0.5. By kind, a figure is of "
    "{each} cases, too few to rank methods by; under 'all' of {count}."
)


@dataclass(frozen=True, slots=True)
class Trip:
    """One photo inverted and reconstructed."""

    model: str
    method: str
    steps: int
    guidance_scale: float
    max_abs_error: float
    mse: float
    """Mean squared error of pixels in [0, 1]."""


def study(bench: Bench) -> Section:
    """Measure reconstruction and edits."""
    settings = [(bench.steps, GUIDANCES[-1])] if bench.quick else list(product(STEPS, GUIDANCES))
    trips = [
        trip
        for (steps, guidance), name in product(settings, INVERSIONS)
        for trip in bench.each(f"{name}, {steps} steps, guidance {guidance:g}", _asker(bench, name, steps, guidance))
    ]
    floors = bench.each("autoencoder alone", lambda model, case: _floor(bench, model, case))
    results = edits.standard(bench)
    taken = edits.seconds(bench, 1 if bench.quick else TIMED)
    names = [edits.UNEDITED, edits.AUTOENCODER, *edits.METHODS, edits.TRUE]
    compared = edits.tables(bench, results, names, _claims)
    return Section(
        title="EDICT, DDIM, SDEdit and DiffEdit",
        about=ABOUT.format(**bench.counts),
        tables=(_returned(bench, trips, floors), *compared, _seconds(bench, taken)),
        sheets=tuple(_sheets(bench, results)),
        figures={
            "reconstruction": [asdict(trip) for trip in trips],
            "floor_mse": [{"model": model, "mse": mse} for model, mse in floors],
            "edits": [item.plain() for item in results],
            "seconds": [{"model": m, "method": n, "seconds": values} for (m, n), values in taken.items()],
        },
    )


# --- reconstruction ---------------------------------------------------------------------------------------------


def _asker(bench: Bench, name: str, steps: int, guidance: float) -> Callable[[str, Case], Trip]:
    def ask(model: str, case: Case) -> Trip:
        made = bench.client.invert(
            case.photo, method=INVERSIONS[name], source_prompt=case.source_prompt, steps=steps, strength=STRENGTH,
            guidance_scale=guidance, verify=True, model=model,
        )  # fmt: skip
        assert made.reconstruction_max_abs_error is not None
        assert made.reconstruction_psnr_db is not None
        mse = 10 ** (-made.reconstruction_psnr_db / 10)
        return Trip(model, name, steps, guidance, made.reconstruction_max_abs_error, mse)

    return ask


def _floor(bench: Bench, model: str, case: Case) -> tuple[str, float]:
    return model, 10 ** (-psnr_db(served.through_autoencoder(bench.client, case, model), case.source) / 10)


def _returned(bench: Bench, trips: Sequence[Trip], floors: Sequence[tuple[str, float]]) -> Table:
    floor = [_row([], [mse for of_model, mse in floors if of_model == model]) for model in bench.models]
    rows = [("autoencoder alone", "", "", *chain(*floor))]
    for key in dict.fromkeys((trip.steps, trip.guidance_scale, trip.method) for trip in trips):
        mine = [trip for trip in trips if (trip.steps, trip.guidance_scale, trip.method) == key]
        by_model = [[trip for trip in mine if trip.model == model] for model in bench.models]
        cells = [_row([trip.max_abs_error for trip in of], [trip.mse for trip in of]) for of in by_model]
        rows.append((key[2], f"{key[0]}", f"{key[1]:g}", *chain(*cells)))
    labels = [figures.of(bench.models, model) for model in bench.models]
    shown = (f"{label}{name}" for label in labels for name in ("latent error", "worst", "pixel MSE x 1000"))
    note = (
        "Latent error: largest absolute difference of any latent, median [quartiles] over the photos, and the worst "
        "photo. Pixel MSE: median [quartiles], pixels in [0, 1]; no inversion comes closer than the autoencoder alone."
    )
    columns = ("", "steps", "guidance", *shown)
    return Table("There and back", columns, tuple(rows), (note, *_returns(bench, trips)))


def _row(errors: Sequence[float], mse: Sequence[float]) -> tuple[str, str, str]:
    pixels = figures.quartiles([1000 * error for error in mse])
    if not errors:
        return "", "", pixels
    low, middle, high = np.quantile(errors, (0.25, 0.5, 0.75))
    return f"{middle:.1e} [{low:.1e}, {high:.1e}]", f"{max(errors):.1e}", pixels


def _returns(bench: Bench, trips: Sequence[Trip]) -> Iterator[str]:
    for model in bench.models:
        of = figures.of(bench.models, model)
        worst = {m: max(t.max_abs_error for t in trips if (t.model, t.method) == (model, m)) for m in INVERSIONS}
        verdict = "holds here" if worst["EDICT"] <= EXACT else "does NOT hold here"
        errors = f"worst {worst['EDICT']:.1e}, DDIM's worst {worst['DDIM']:.1e}"
        yield f"{of}*EDICT comes back exactly*: {verdict}; {errors}."
        ddim = [t for t in trips if (t.model, t.method) == (model, "DDIM")]
        used = sorted({t.guidance_scale for t in ddim})
        medians = [median(t.max_abs_error for t in ddim if t.guidance_scale == guidance) for guidance in used]
        if len(used) > 1:
            verdict = "holds here" if medians == sorted(medians) else "does NOT hold here"
            listed = ", ".join(f"{m:.2g} at {g:g}" for g, m in zip(used, medians, strict=True))
            yield f"{of}*Guidance makes DDIM's return worse*: {verdict}; median latent error {listed}."


# --- edits ------------------------------------------------------------------------------------------------------


def _claims(results: Sequence[edits.Judged]) -> Iterator[str]:
    error = " of MSE x 1000"
    success = edits.gains(results, "EDICT", "DDIM", edits.points)
    yield figures.claim("EDICT's edits succeed more often than DDIM's", success, unit=" points", digits=1)
    kept = edits.gains(results, "EDICT", "DDIM", edits.outside)
    yield figures.claim("EDICT's edits keep more outside the region than DDIM's", kept, unit=error, digits=2)
    for method in ("EDICT", "DDIM"):
        hit = edits.gains(results, method, edits.UNEDITED, edits.target)
        yield figures.claim(f"{method}'s edits are nearer to the true target than the photo", hit, unit=error, digits=2)


def _seconds(bench: Bench, taken: dict[tuple[str, str], list[float]]) -> Table:
    rows = [
        (name, *(f"{median(taken[m, name]):.1f} ({min(taken[m, name]):.1f} to {max(taken[m, name]):.1f})"
                 for m in bench.models)) for name in edits.METHODS
    ]  # fmt: skip
    count = len(next(iter(taken.values())))
    return Table(
        f"Seconds of one edit, alone, {bench.dtype} network", ("", *bench.models), tuple(rows),
        (f"Median (smallest to largest) of {count} photos one after another, inversion and pictures included, on the "
         "machine named above; seconds from other machines or days say nothing beside these.",),
    )  # fmt: skip


def _sheets(bench: Bench, results: Sequence[edits.Judged]) -> Iterator[Sheet]:
    pictures = {(item.model, item.case, item.method): item.picture for item in results}
    for model in bench.models:
        names = ("photo", "true", *edits.METHODS)
        rows = [(c.source, c.target, *(pictures[model, c.name, n] for n in edits.METHODS)) for c in bench.shown]
        suffix = f"-{model}" if len(bench.models) > 1 else ""
        yield Sheet(f"quality-edits{suffix}", tuple(_short(name) for name in names), tuple(rows))


def _short(name: str) -> str:
    return name.replace(", strength", "")
