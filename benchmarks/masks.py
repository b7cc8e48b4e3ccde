"""Overlap of DiffEdit's masks with the true regions, errors of all methods outside them, and DDIM's two conventions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import product
from statistics import mean, median

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from underpaint import Client, Ddim, DdimInversion, DiffEdit, Edict, Inversion, SdEdit
from underpaint.methods import Convention
from underpaint_server.local_server import LocalServer

from benchmarks import cases, served
from benchmarks.report import Report, Table, console

THRESHOLDS = (0.3, 0.5)
MASK_STRENGTHS = (0.5, 0.6)
CONVENTIONS = (Convention.TARGET, Convention.CURRENT)
GUIDANCES = (1.0, 3.0)
STRENGTH = 0.8
BESIDE = 8
"""Cases that run at the same time; changes the duration of the benchmark, not its figures."""
ABOUT = (
    "{count} composites with known answers (tests/data/composites: held-out sprites, one thing changed, true target "
    "and true region known), on a real server of the embedded model, bfloat16, {steps} steps. DiffEdit: strength 0.8,"
    " guidance 5, compared with the source prompt; DDIM and EDICT: strength 0.8, guidance 3; SDEdit: strength 0.6, "
    "guidance 3. A mask's overlap with the true region is intersection over union at pixel size; masks have the "
    "latents' resolution, 4 pixels, and 'best possible' is what the true region scores when it is drawn that "
    "coarsely. PSNR outside the region compares an edit with the photo where nothing should change. Both PSNRs are to"
    " be read beside 'none', the photo that only went through the autoencoder."
)
LEGEND = (
    "Each case: photo, true target, true region, DiffEdit's mask and edit (mask strength 0.5, threshold 0.3), DDIM, "
    "EDICT, SDEdit."
)


@dataclass(frozen=True, slots=True)
class Found:
    """DiffEdit's mask and edit of one case at one setting."""

    kind: str
    threshold: float
    mask_strength: float
    iou: float
    coverage: float
    outside_db: float
    target_db: float
    mask: NDArray[np.bool_] = field(repr=False)
    picture: NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Changed:
    """The edit of one case by another method."""

    kind: str
    method: str
    outside_db: float
    target_db: float
    picture: NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Returned:
    """The DDIM round trip of one case at one setting."""

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
    """Run the benchmark; see the module."""
    steps, chosen = (20, cases.load(1)) if quick else (50, cases.load())
    with LocalServer(dtype="bfloat16") as server, Client(server.target, timeout=1200) as client:
        sheets: list[Sheet] = []
        for i in range(0, len(chosen), BESIDE):
            sheets += served.at_once([partial(_measure, client, case, steps) for case in chosen[i : i + BESIDE]])
            console.print(f"{len(sheets)} of {len(chosen)} cases")
    return Report(
        name="masks",
        about=ABOUT.format(count=len(chosen), steps=steps),
        tables=(_overlap(sheets), _outside(sheets), _target(sheets), _conventions(sheets)),
        findings=tuple(_findings(sheets)),
        figures={
            sheet.case.name: {
                "best_iou": sheet.best_iou,
                **{part: [_plain(item) for item in getattr(sheet, part)] for part in ("found", "changed", "returned")},
            }
            for sheet in sheets
        },
        picture=_contact_sheet(sheets),
        legend=LEGEND,
    )


def _measure(client: Client, case: cases.Case, steps: int) -> Sheet:
    plain = client.invert(case.photo, method=DdimInversion(), steps=steps, strength=STRENGTH, guidance_scale=1.0)
    return Sheet(
        case=case,
        best_iou=cases.iou(cases.coarse(case.region), case.region),
        found=[_find(client, case, plain, t, m) for t, m in product(THRESHOLDS, MASK_STRENGTHS)],
        changed=list(_change(client, case, steps)),
        returned=[_return(client, case, steps, c, g) for c, g in product(CONVENTIONS, GUIDANCES)],
    )


# --- measurements -------------------------------------------------------------------------------------------------


def _find(client: Client, case: cases.Case, inversion: Inversion, threshold: float, mask_strength: float) -> Found:
    method = DiffEdit(threshold=threshold, mask_strength=mask_strength, reference_prompt=case.source_prompt)
    edited = client.edit(inversion, case.target_prompt, method, guidance_scale=5.0, seed=1)
    assert edited.mask is not None
    mask = np.asarray(edited.mask) >= 128
    pixels = cases.pixels(edited.image)
    outside_db = cases.psnr_db(pixels, case.source, ~case.region)
    target_db = cases.psnr_db(pixels, case.target)
    return Found(
        case.kind, threshold, mask_strength, cases.iou(mask, case.region), float(mask.mean()), outside_db, target_db,
        mask, pixels,
    )  # fmt: skip


def _change(client: Client, case: cases.Case, steps: int) -> Iterable[Changed]:
    """The photo encoded and decoded, then the edits by every method but DiffEdit."""
    yield _judged(case, "none (autoencoder alone)", served.through_autoencoder(client, case))
    for method in (
        Ddim(steps=steps, strength=STRENGTH),
        Edict(steps=steps, strength=STRENGTH),
        SdEdit(steps=steps, strength=0.6),
    ):
        source_prompt = "" if isinstance(method, SdEdit) else case.source_prompt
        edited = client.edit(
            case.photo, case.target_prompt, method, source_prompt=source_prompt, guidance_scale=3.0, seed=1
        )
        yield _judged(case, type(method).__name__, cases.pixels(edited.image))


def _judged(case: cases.Case, method: str, pixels: NDArray[np.uint8]) -> Changed:
    outside_db = cases.psnr_db(pixels, case.source, ~case.region)
    return Changed(case.kind, method, outside_db, cases.psnr_db(pixels, case.target), pixels)


def _return(client: Client, case: cases.Case, steps: int, convention: Convention, guidance: float) -> Returned:
    made = client.invert(
        case.photo, method=DdimInversion(convention=convention), source_prompt=case.source_prompt, steps=steps,
        strength=STRENGTH, guidance_scale=guidance, verify=True,
    )  # fmt: skip
    assert made.reconstruction_max_abs_error is not None
    assert made.reconstruction_psnr_db is not None
    return Returned(convention.value, guidance, made.reconstruction_max_abs_error, made.reconstruction_psnr_db)


# --- pictures -----------------------------------------------------------------------------------------------------


def _contact_sheet(sheets: Sequence[Sheet], cases_per_row: int = 2) -> Image.Image:
    """The images of :data:`LEGEND` for every case, with 2 pixels between images."""
    strips = [_strip(sheet) for sheet in sheets]
    step = 66
    width = step * len(strips[0]) * cases_per_row
    paper = Image.new("RGB", (width, step * -(-len(strips) // cases_per_row)), "white")
    for number, strip in enumerate(strips):
        row, column = divmod(number, cases_per_row)
        for index, picture in enumerate(strip):
            paper.paste(Image.fromarray(picture), (step * (column * len(strip) + index), step * row))
    return paper


def _strip(sheet: Sheet) -> list[NDArray[np.uint8]]:
    (shown,) = _at([sheet], threshold=0.3, mask_strength=0.5)
    masks = [np.repeat(np.uint8(255) * mask[..., None], 3, 2) for mask in (sheet.case.region, shown.mask)]
    others = [changed.picture for changed in sheet.changed[1:]]
    return [sheet.case.source, sheet.case.target, *masks, shown.picture, *others]


def _plain(item: Found | Changed | Returned) -> dict[str, object]:
    return {f.name: getattr(item, f.name) for f in fields(item) if f.name not in ("mask", "picture")}


# --- tables -----------------------------------------------------------------------------------------------------


def _by_kind(values: Sequence[tuple[str, float]], digits: int) -> tuple[str, ...]:
    """The mean figure of each kind of edit, then of all, as cells; ``values`` are pairs of kind and figure."""
    groups = [[value for kind, value in values if kind == wanted] for wanted in cases.KINDS]
    return tuple(f"{mean(group):.{digits}f}" for group in [*groups, [value for _, value in values]])


def _overlap(sheets: Sequence[Sheet]) -> Table:
    rows = [
        (f"{m}", f"{t}", *_by_kind([(f.kind, f.iou) for f in _at(sheets, t, m)], 2))
        for m, t in product(MASK_STRENGTHS, THRESHOLDS)
    ]
    best = ("best possible", "", *_by_kind([(s.case.kind, s.best_iou) for s in sheets], 2))
    columns = ("mask strength", "threshold", *cases.KINDS, "all")
    return Table("Overlap of DiffEdit's mask with the true region", columns, (*rows, best))


def _outside(sheets: Sequence[Sheet]) -> Table:
    rows = [(name, *_by_kind([(i.kind, i.outside_db) for i in items], 1)) for name, items in _results(sheets)]
    columns = ("method", *cases.KINDS, "all")
    return Table("PSNR outside the true region, edit against photo, dB", columns, tuple(rows))


def _target(sheets: Sequence[Sheet]) -> Table:
    rows = [(name, *_by_kind([(i.kind, i.target_db) for i in items], 1)) for name, items in _results(sheets)]
    columns = ("method", *cases.KINDS, "all")
    return Table("PSNR to the true target, dB", columns, tuple(rows))


def _results(sheets: Sequence[Sheet]) -> Iterator[tuple[str, Sequence[Found | Changed]]]:
    for name in [changed.method for changed in sheets[0].changed]:
        yield name, [c for sheet in sheets for c in sheet.changed if c.method == name]
    for m, t in product(MASK_STRENGTHS, THRESHOLDS):
        yield f"DiffEdit, mask strength {m}, threshold {t}", _at(sheets, t, m)


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
    scores = {(m, t): mean(f.iou for f in _at(sheets, t, m)) for m, t in product(MASK_STRENGTHS, THRESHOLDS)}
    m, t = max(scores, key=lambda setting: scores[setting])
    best = mean(s.best_iou for s in sheets)
    yield (
        f"Masks overlap the true region best at mask strength {m}, threshold {t}: {scores[m, t]:.2f} of {best:.2f} "
        f"possible; at the defaults (0.5, 0.5) {scores[0.5, 0.5]:.2f}."
    )
    for guidance in GUIDANCES:
        medians = {convention: _psnr_db(sheets, convention, guidance) for convention in CONVENTIONS}
        better = max(medians, key=lambda convention: medians[convention])
        gap = abs(medians[Convention.TARGET] - medians[Convention.CURRENT])
        yield f"DDIM comes back closer under '{better.value}' at guidance {guidance:g}, by {gap:.2f} dB in the median."


def _at(sheets: Sequence[Sheet], threshold: float, mask_strength: float) -> list[Found]:
    return [f for s in sheets for f in s.found if (f.threshold, f.mask_strength) == (threshold, mask_strength)]


def _psnr_db(sheets: Sequence[Sheet], convention: Convention, guidance: float) -> float:
    wanted = (convention.value, guidance)
    return median(r.psnr_db for s in sheets for r in s.returned if (r.convention, r.guidance_scale) == wanted)
