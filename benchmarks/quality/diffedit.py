"""DiffEdit: its masks against the true regions, what the mask protects, and ablations of mask and encoding."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from underpaint import DiffEdit
from underpaint_server.backends import load
from underpaint_server.settings import Settings

from benchmarks.cases import Case, coarse, iou
from benchmarks.quality import edits, figures, unencoded
from benchmarks.quality.bench import Bench, bar
from benchmarks.quality.section import Section, Sheet
from benchmarks.report import Table

THRESHOLDS = (0.25, 0.5, 0.75)
DEFAULT = 0.5
MASK_STRENGTH = 0.5
STRENGTH, GUIDANCE = 0.8, 5.0
BEST = "best possible"
NO_MASK, TRUE_MASK = "no mask", "true mask given"
NO_ENCODING, NEITHER = "no encoding, threshold 0.5", "no encoding, true mask"
ABOUT = (
    "Masks are compared with the regions in which source and target truly differ, at pixel size; they have the latents'"
    " resolution, and 'best possible' is the true region drawn that coarsely. The mask compares the source's caption "
    "with the target's at mask strength 0.5, {samples} noise samples. Edits: {steps} steps, strength 0.8, guidance 5, "
    "one seed. 'No mask' may change everything; 'true mask given' is told where; 'no encoding' starts from noise as "
    "SDEdit does, inside and outside the mask, instead of from the DDIM inversion. The service does not offer that; it "
    "was computed in the benchmark's own process, with the service's algorithm on a noised trajectory. By kind, a "
    "figure is of {each} cases, too few to rank settings by; under 'all' of {count}."
)

Region = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Found:
    """One mask compared with the true region."""

    model: str
    setting: str
    case: str
    kind: str
    iou: float
    precision: float | None
    """None for an empty mask, for which it is undefined."""
    recall: float
    coverage: float
    mask: Region = field(repr=False)

    def plain(self) -> dict[str, Any]:
        """All fields but the mask."""
        return {name: value for name, value in asdict(self).items() if name != "mask"}


def study(bench: Bench) -> Section:
    """Measure the masks, the edits with them, and the edits with parts of the method left out."""
    masks = [m for group in bench.each("DiffEdit masks", partial(_masks, bench)) for m in group]
    drawn = {(m.model, m.case, m.setting): m.mask for m in masks}
    made: list[edits.Judged] = []
    for name, which in _MASKS_OF_EDITS.items():
        made += bench.each(name, partial(_edit, bench, drawn, name, which))
    made += _without_encoding(bench, drawn)
    beside = [item for item in edits.standard(bench) if item.method not in ("DDIM", "EDICT", "DiffEdit")]
    names = [edits.UNEDITED, edits.AUTOENCODER, *_MASKS_OF_EDITS, NO_ENCODING, NEITHER]
    names += ["SDEdit, strength 0.6", "SDEdit, strength 0.8", edits.TRUE]
    results = [*beside, *made]
    return Section(
        title="DiffEdit",
        about=ABOUT.format(**bench.counts),
        tables=(*_mask_tables(bench, masks), *edits.tables(bench, results, names, _claims)),
        sheets=tuple(_sheets(bench, drawn, made)),
        figures={"masks": [m.plain() for m in masks], "edits": [item.plain() for item in made]},
    )


# --- masks ------------------------------------------------------------------------------------------------------


def _masks(bench: Bench, model: str, case: Case) -> list[Found]:
    method = DiffEdit(
        reference_prompt=case.source_prompt, mask_strength=MASK_STRENGTH, steps=bench.steps, samples=bench.mask_samples
    )
    answer = bench.client.compute_mask(case.photo, case.target_prompt, method, seed=edits.SEED, model=model)
    difference = np.asarray(answer.difference)
    cut = {_threshold(t): _at_case_size(difference > t, case) for t in THRESHOLDS}
    return [
        *(_found(model, setting, case, mask) for setting, mask in cut.items()),
        _found(model, BEST, case, coarse(case.region)),
    ]


def _found(model: str, setting: str, case: Case, mask: Region) -> Found:
    hit = float((mask & case.region).sum())
    return Found(
        model, setting, case.name, case.kind, iou(mask, case.region), hit / float(mask.sum()) if mask.any() else None,
        hit / float(case.region.sum()), float(mask.mean()), mask,
    )  # fmt: skip


def _threshold(value: float) -> str:
    return f"threshold {value:g}"


def _at_case_size(mask: Region, case: Case) -> Region:
    height, width = case.region.shape
    drawn = Image.fromarray(np.uint8(255) * mask).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(drawn) >= 128


def _mask_tables(bench: Bench, masks: Sequence[Found]) -> Iterator[Table]:
    settings = [*map(_threshold, THRESHOLDS), BEST]
    figures_of: dict[str, Callable[[Found], float | None]] = {
        "Overlap of the mask with the true region (intersection over union)": lambda m: m.iou,
        "Precision of the mask": lambda m: m.precision,
        "Recall of the mask": lambda m: m.recall,
    }
    for caption, figure in figures_of.items():
        rows = []
        for setting in settings:
            mine = [m for m in masks if m.setting == setting]
            cell = partial(_mean, figure)
            rows.append((setting, *figures.cells(mine, lambda m: m.model, lambda m: m.kind, bench.models, cell)))
        notes = _mask_notes(bench, masks) if "union" in caption else iter(["Mean ± standard error."])
        yield Table(caption, ("", *figures.columns(bench.models)), tuple(rows), tuple(notes))


def _mean(figure: Callable[[Found], float | None], items: Sequence[Found]) -> str:
    values = [value for value in map(figure, items) if value is not None]
    return figures.mean_error(values) if values else "all empty"


def _mask_notes(bench: Bench, masks: Sequence[Found]) -> Iterator[str]:
    cut = [m for m in masks if m.setting != BEST]
    empty = sum(m.precision is None for m in cut)
    yield f"Mean ± standard error. {empty} of {len(cut)} masks hold nothing; they count as overlap 0."
    for model in bench.models:
        of = {t: {m.case: m.iou for m in cut if (m.model, m.setting) == (model, _threshold(t))} for t in THRESHOLDS}
        rival = max((t for t in THRESHOLDS if t != DEFAULT), key=lambda t: mean(of[t].values()))
        gains = [of[DEFAULT][case] - of[rival][case] for case in of[DEFAULT]]
        text = f"The paper's threshold 0.5 finds the region better than {rival:g}"
        yield figures.of(bench.models, model) + figures.claim(text, gains, unit=" of overlap")


# --- edits ------------------------------------------------------------------------------------------------------

Masks = dict[tuple[str, str, str], Region]

_MASKS_OF_EDITS: dict[str, str] = {
    **{f"DiffEdit, {_threshold(t)}": _threshold(t) for t in THRESHOLDS}, TRUE_MASK: TRUE_MASK, NO_MASK: NO_MASK
}  # fmt: skip
"""Name in the tables -> the mask of the edit."""


def _chosen(drawn: Masks, which: str, model: str, case: Case) -> Region:
    if which == TRUE_MASK:
        return case.region
    return np.ones_like(case.region) if which == NO_MASK else drawn[model, case.name, which]


def _edit(bench: Bench, drawn: Masks, name: str, which: str, model: str, case: Case) -> edits.Judged:
    mask = Image.fromarray(np.uint8(255) * _chosen(drawn, which, model, case))
    picture = edits.request(bench, model, case, DiffEdit(mask=mask, strength=STRENGTH))
    return edits.judged(bench, model, name, case, picture)


def _without_encoding(bench: Bench, drawn: Masks) -> Iterator[edits.Judged]:
    choices = {NO_ENCODING: _threshold(DEFAULT), NEITHER: TRUE_MASK}
    for model, location in bench.locations.items():
        backend = load(str(location), model, Settings(dtype=bench.dtype, exact_batching="pinned"))
        for name, which in choices.items():
            with bar() as progress:
                task = progress.add_task(f"{model}: {name}", total=len(bench.cases))
                generators = [
                    unencoded.edit(
                        backend.facts, case, _chosen(drawn, which, model, case), steps=bench.steps, strength=STRENGTH,
                        guidance_scale=GUIDANCE, seed=edits.SEED,
                    )
                    for case in bench.cases
                ]  # fmt: skip
                for number, picture in unencoded.run(backend, generators):
                    case = bench.cases[number]
                    shown = edits.at_case_size(Image.fromarray(picture), case)
                    yield edits.judged(bench, model, name, case, shown)
                    progress.advance(task)


def _claims(results: Sequence[edits.Judged]) -> Iterator[str]:
    default, same = f"DiffEdit, {_threshold(DEFAULT)}", "SDEdit, strength 0.8"
    error = " of MSE x 1000"
    protects = edits.gains(results, default, NO_MASK, edits.outside)
    yield figures.claim("The mask protects what is outside the region", protects, unit=error, digits=2)
    keeps = edits.gains(results, default, same, edits.outside)
    yield figures.claim("DiffEdit keeps more outside the region than SDEdit at 0.8", keeps, unit=error, digits=2)
    wins = edits.gains(results, default, same, edits.points)
    yield figures.claim("DiffEdit succeeds more often than SDEdit at 0.8", wins, unit=" points", digits=1)
    for text, figure, unit in (
        ("With the true mask, encoding keeps more outside the region than noise", edits.outside, error),
        ("With the true mask, encoding comes nearer to the true target than noise", edits.target, error),
        ("With the true mask, encoding succeeds more often than noise", edits.points, " points"),
    ):
        yield figures.claim(text, edits.gains(results, TRUE_MASK, NEITHER, figure), unit=unit, digits=2)


# --- pictures ---------------------------------------------------------------------------------------------------


def _sheets(bench: Bench, drawn: Masks, made: Sequence[edits.Judged]) -> Iterator[Sheet]:
    pictures = {(item.model, item.case, item.method): item.picture for item in made}
    shown = [*_MASKS_OF_EDITS, NO_ENCODING, NEITHER]
    heads = ["photo", "true", "region", *(f"mask {t:g}" for t in THRESHOLDS), *(f"edit {t:g}" for t in THRESHOLDS)]
    heads += ["true mask", "no mask", "no enc. .5", "no enc. true"]
    for model in bench.models:
        rows = []
        for case in bench.shown:
            masks = (drawn[model, case.name, _threshold(t)] for t in THRESHOLDS)
            rows.append(
                (case.source, case.target, case.region, *masks, *(pictures[model, case.name, n] for n in shown))
            )
        suffix = f"-{model}" if len(bench.models) > 1 else ""
        yield Sheet(f"quality-diffedit{suffix}", tuple(heads), tuple(rows), abreast=1)
