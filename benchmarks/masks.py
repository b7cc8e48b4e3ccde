"""How well DiffEdit finds the region of an edit, what the methods do outside it, and DDIM's two conventions."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from underpaint import Client, Ddim, DdimInversion, DiffEdit, Edict, Inversion, SdEdit
from underpaint.methods import Convention

from benchmarks import cases, served
from benchmarks.report import Report, Table, console
from underpaint_server.local import LocalServer

THRESHOLDS = (0.3, 0.5)
MASK_STRENGTHS = (0.5, 0.6)
CONVENTIONS = (Convention.TARGET, Convention.CURRENT)
GUIDANCES = (1.0, 3.0)
STRENGTH = 0.8
BESIDE = 4
"""Cases that run at one time: it changes the time this takes, not the answers."""
ABOUT = (
    "{count} composites with known answers (tests/data/composites: held-out sprites, one thing changed, true target and "
    "true region known), on a real server of the embedded model, bfloat16, {steps} steps, strength 0.8. The mask's "
    "overlap with the true region is intersection over union at pixel size; the mask itself has the latents' "
    "resolution, 4 pixels, and the column 'best possible' is what the true region scores when it is drawn that coarsely. "
    "PSNR outside the region compares the edit with the photo where nothing should change; the autoencoder alone sets "
    "its ceiling. PSNR to the target compares the edit with the true target, and is to be read beside that of the photo "
    "left as it is."
)


@dataclass(frozen=True, slots=True)
class Found:
    """DiffEdit on one case at one setting."""

    kind: str
    threshold: float
    mask_strength: float
    iou: float
    coverage: float
    outside_db: float
    target_db: float


@dataclass(frozen=True, slots=True)
class Changed:
    """Any method on one case."""

    kind: str
    method: str
    outside_db: float
    target_db: float


@dataclass(frozen=True, slots=True)
class Returned:
    """DDIM there and back on one case."""

    convention: str
    guidance_scale: float
    max_abs_error: float
    psnr_db: float


@dataclass(frozen=True, slots=True)
class Sheet:
    """Everything measured on one case."""

    case: cases.Case
    best_iou: float
    found: list[Found]
    changed: list[Changed]
    returned: list[Returned]


def run(quick: bool) -> Report:
    """See the module."""
    steps, chosen = (20, cases.load(1)) if quick else (50, cases.load())
    with LocalServer(dtype="bfloat16") as server, Client(server.target, timeout=1200) as client:
        sheets: list[Sheet] = []
        for i in range(0, len(chosen), BESIDE):
            sheets += served.at_once([_measurement(client, case, steps) for case in chosen[i : i + BESIDE]])
            console.print(f"{len(sheets)} of {len(chosen)} cases")
    return Report(
        name="masks",
        about=ABOUT.format(count=len(chosen), steps=steps),
        tables=(_overlap(sheets), _outside(sheets), _methods(sheets), _conventions(sheets)),
        findings=tuple(_findings(sheets)),
        figures={
            sheet.case.name: {
                "best_iou": sheet.best_iou,
                **{part: [asdict(item) for item in getattr(sheet, part)] for part in ("found", "changed", "returned")},
            }
            for sheet in sheets
        },
    )


def _measurement(client: Client, case: cases.Case, steps: int) -> Callable[[], Sheet]:
    def measure() -> Sheet:
        plain = client.invert(case.photo, method=DdimInversion(), steps=steps, strength=STRENGTH, guidance_scale=1.0)
        return Sheet(
            case=case,
            best_iou=_iou(_coarse(case.region), case.region),
            found=[_find(client, case, plain, t, m) for t, m in product(THRESHOLDS, MASK_STRENGTHS)],
            changed=list(_change(client, case, steps)),
            returned=[_return(client, case, steps, c, g) for c, g in product(CONVENTIONS, GUIDANCES)],
        )

    return measure


# --- one figure at a time -----------------------------------------------------------------------------------------


def _find(client: Client, case: cases.Case, inversion: Inversion, threshold: float, mask_strength: float) -> Found:
    method = DiffEdit(threshold=threshold, mask_strength=mask_strength, reference_prompt=case.source_prompt)
    edited = client.edit(inversion, case.target_prompt, method, guidance_scale=5.0, seed=1)
    assert edited.mask is not None
    mask = np.asarray(edited.mask) >= 128
    pixels = cases.pixels(edited.image)
    outside_db = cases.psnr_db(pixels, case.source, ~case.region)
    target_db = cases.psnr_db(pixels, case.target)
    return Found(
        case.kind, threshold, mask_strength, _iou(mask, case.region), float(mask.mean()), outside_db, target_db
    )


def _change(client: Client, case: cases.Case, steps: int) -> Iterable[Changed]:
    """The photo itself, then every method but DiffEdit."""
    yield Changed(case.kind, "photo as it is", float("inf"), cases.psnr_db(case.source, case.target))
    for method in (
        Ddim(steps=steps, strength=STRENGTH),
        Edict(steps=steps, strength=STRENGTH),
        SdEdit(steps=steps, strength=0.6),
    ):
        source_prompt = "" if isinstance(method, SdEdit) else case.source_prompt
        edited = client.edit(
            case.photo, case.target_prompt, method, source_prompt=source_prompt, guidance_scale=3.0, seed=1
        )
        pixels = cases.pixels(edited.image)
        outside_db, target_db = cases.psnr_db(pixels, case.source, ~case.region), cases.psnr_db(pixels, case.target)
        yield Changed(case.kind, type(method).__name__, outside_db, target_db)


def _return(client: Client, case: cases.Case, steps: int, convention: Convention, guidance: float) -> Returned:
    made = client.invert(
        case.photo, method=DdimInversion(convention=convention), source_prompt=case.source_prompt, steps=steps,
        strength=STRENGTH, guidance_scale=guidance, verify=True,
    )  # fmt: skip
    assert made.reconstruction_max_abs_error is not None
    assert made.reconstruction_psnr_db is not None
    return Returned(convention.value, guidance, made.reconstruction_max_abs_error, made.reconstruction_psnr_db)


def _iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / (one | other).sum())


def _coarse(region: NDArray[np.bool_], cell: int = 4) -> NDArray[np.bool_]:
    """The region in cells of the latents' size, each as most of its pixels are."""
    height, width = region.shape
    majority = region.reshape(height // cell, cell, width // cell, cell).mean((1, 3)) >= 0.5
    return majority.repeat(cell, 0).repeat(cell, 1)


# --- tables -----------------------------------------------------------------------------------------------------


def _by_kind(sheets: Sequence[Sheet], figure: Callable[[Sheet], Iterable[float]], digits: int) -> tuple[str, ...]:
    """The mean figure over each kind of edit, then over all."""
    groups = [[s for s in sheets if s.case.kind == kind] for kind in cases.KINDS]
    return tuple(f"{mean(value for s in group for value in figure(s)):.{digits}f}" for group in [*groups, sheets])


def _overlap(sheets: Sequence[Sheet]) -> Table:
    rows = [
        (f"{m}", f"{t}", *_by_kind(sheets, lambda s, t=t, m=m: [f.iou for f in _at(s, t, m)], 2))
        for m, t in product(MASK_STRENGTHS, THRESHOLDS)
    ]  # fmt: skip
    best = ("best possible", "", *_by_kind(sheets, lambda s: [s.best_iou], 2))
    return Table("Overlap of DiffEdit's mask with the true region", ("mask strength", "threshold", *cases.KINDS, "all"),
                 (*rows, best))  # fmt: skip


def _outside(sheets: Sequence[Sheet]) -> Table:
    rows = [
        (f"{m}", f"{t}", *_by_kind(sheets, lambda s, t=t, m=m: [f.outside_db for f in _at(s, t, m)], 1))
        for m, t in product(MASK_STRENGTHS, THRESHOLDS)
    ]  # fmt: skip
    columns = ("mask strength", "threshold", *cases.KINDS, "all")
    return Table("DiffEdit, guidance 5: PSNR outside the true region, dB", columns, tuple(rows))


def _methods(sheets: Sequence[Sheet]) -> Table:
    rows = [
        (f"DiffEdit {m}, {t}", f"{_mean_outside(_at(s, t, m) for s in sheets):.1f}",
         *_by_kind(sheets, lambda s, t=t, m=m: [f.target_db for f in _at(s, t, m)], 1))
        for m, t in product(MASK_STRENGTHS, THRESHOLDS)
    ]  # fmt: skip
    for name in [changed.method for changed in sheets[0].changed]:
        outside = _mean_outside([c for c in s.changed if c.method == name] for s in sheets)
        target = _by_kind(sheets, lambda s, name=name: [c.target_db for c in s.changed if c.method == name], 1)
        rows.append((name, f"{outside:.1f}", *target))
    columns = ("method", "outside, all kinds", *(f"target, {kind}" for kind in cases.KINDS), "target, all")
    return Table("Every method: PSNR outside the true region and to the true target, dB", columns, tuple(rows))


def _conventions(sheets: Sequence[Sheet]) -> Table:
    rows = []
    for guidance, convention in product(GUIDANCES, CONVENTIONS):
        mine = [r for s in sheets for r in s.returned if (r.convention, r.guidance_scale) == (convention, guidance)]
        errors, psnr = [r.max_abs_error for r in mine], [r.psnr_db for r in mine]
        rows.append((convention.value, f"{guidance:g}", f"{median(errors):.2f}", f"{max(errors):.2f}",
                     f"{median(psnr):.2f}", f"{min(psnr):.2f}"))  # fmt: skip
    columns = ("network is told", "guidance", "latent error median", "worst", "PSNR median dB", "worst dB")
    return Table("DDIM there and back: the level gone to (target) or the level at hand (current)", columns, tuple(rows))


def _findings(sheets: Sequence[Sheet]) -> Iterable[str]:
    scores = {(m, t): mean(f.iou for s in sheets for f in _at(s, t, m)) for m, t in product(MASK_STRENGTHS, THRESHOLDS)}
    m, t = max(scores, key=lambda setting: scores[setting])
    best = mean(s.best_iou for s in sheets)
    yield (
        f"Masks overlap the true region best at mask strength {m}, threshold {t}: {scores[m, t]:.2f} of {best:.2f} "
        f"possible; at the defaults (0.5, 0.5) {scores[0.5, 0.5]:.2f}."
    )
    for guidance in GUIDANCES:
        medians = {
            c: median(r.psnr_db for s in sheets for r in s.returned if (r.convention, r.guidance_scale) == (c, guidance))
            for c in CONVENTIONS
        }
        better = max(medians, key=lambda convention: medians[convention])
        gap = abs(medians[Convention.TARGET] - medians[Convention.CURRENT])
        yield f"DDIM comes back closer under '{better.value}' at guidance {guidance:g}, by {gap:.2f} dB in the median."


def _at(sheet: Sheet, threshold: float, mask_strength: float) -> list[Found]:
    return [f for f in sheet.found if (f.threshold, f.mask_strength) == (threshold, mask_strength)]


def _mean_outside(groups: Iterable[Sequence[Any]]) -> float:
    return mean(item.outside_db for group in groups for item in group)
