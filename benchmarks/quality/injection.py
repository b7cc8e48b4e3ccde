"""Content injection: how much of the content arrives and how much of the style stays, over the strength of the mix."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from underpaint import ContentInjection

from benchmarks.cases import Case
from benchmarks.quality import edits, figures
from benchmarks.quality.bench import Bench
from benchmarks.quality.section import Section, Sheet
from benchmarks.report import Table

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
STRONG = 0.75
LERP, CALIBRATED, REGION = "lerp, 0.75", "calibrated, 0.75", "left half, 0.75"
SOURCE, CONTENT = "the style picture itself", "the content picture itself"
PIXELS = NDArray[np.float64]
ABOUT = (
    "{pairs} pairs of composites: the style picture is drawn again with the content picture's activations mixed into "
    "the network's middle block at every step ({steps} steps, injected down to 40 % of the noise schedule, guidance 1, "
    "empty prompts). Distances are taken from the picture to its two sources. Content is where the edges are: 1 minus "
    "the correlation of the two pictures' gradient magnitudes, smoothed; it does not see colour. Style is the colours: "
    "the difference of the means and standard deviations of the channels. Both are 0 for equal pictures; rows of the "
    "two sources themselves give the scale. The paper's setting is an unconditional network on pixels; a latent "
    "network's middle block is small, and its skip connections carry most of a picture past it."
)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One injection, or one of its sources."""

    model: str
    setting: str
    pair: str
    content: float
    """Distance from the content picture."""
    style: float
    """Distance from the style picture."""
    inside: float | None
    """Share of the change that lies in the left half; None where nothing changed."""
    picture: edits.Pixels = field(repr=False)

    def plain(self) -> dict[str, Any]:
        """Without the picture."""
        return {name: value for name, value in asdict(self).items() if name != "picture"}


def study(bench: Bench) -> Section:
    """The curve over the weight, then each option at one weight."""
    partners = _partners(bench.cases)
    made: list[Drawn] = []
    for name, method in _settings().items():
        made += bench.each(f"content injection, {name}", partial(_draw, bench, partners, name, method))
    made = [*_sources(bench, partners), *_with_change(made)]
    return Section(
        title="Content injection",
        about=ABOUT.format(**bench.counts, pairs=len(bench.cases)),
        tables=(_table(bench, made),),
        sheets=tuple(_sheets(bench, partners, made)),
        figures={"drawn": [item.plain() for item in made]},
    )


def _partners(cases: Sequence[Case]) -> dict[str, Case]:
    """Each style picture's content: the case half way round, of another kind."""
    return {case.name: cases[(number + len(cases) // 2) % len(cases)] for number, case in enumerate(cases)}


def _settings() -> dict[str, dict[str, Any]]:
    left = np.zeros((64, 64), np.uint8)
    left[:, :32] = 255
    curve = {f"slerp, {weight:g}": {"weight": weight} for weight in WEIGHTS}
    return curve | {
        LERP: {"weight": STRONG, "interpolation": "lerp"},
        CALIBRATED: {"weight": STRONG, "calibration": 0.5},
        REGION: {"weight": STRONG, "region": Image.fromarray(left)},
    }


def _draw(bench: Bench, partners: dict[str, Case], name: str, options: dict[str, Any], model: str, case: Case) -> Drawn:
    method = ContentInjection(content=partners[case.name].photo, steps=bench.steps, **options)
    answer = bench.client.edit(case.photo, "", method, guidance_scale=1.0, seed=edits.SEED, model=model)
    return _drawn(model, name, case, partners[case.name], edits.at_case_size(answer.image, case))


def _sources(bench: Bench, partners: dict[str, Case]) -> Iterator[Drawn]:
    for model in bench.models:
        for case in bench.cases:
            content = partners[case.name]
            yield _drawn(model, SOURCE, case, content, case.source)
            yield _drawn(model, CONTENT, case, content, content.source)


def _drawn(model: str, name: str, case: Case, content: Case, picture: edits.Pixels) -> Drawn:
    from_content, from_style = _content_distance(picture, content.source), _style_distance(picture, case.source)
    return Drawn(model, name, case.name, from_content, from_style, None, picture)


def _with_change(made: Sequence[Drawn]) -> Iterator[Drawn]:
    """Where each picture differs from the one of weight 0."""
    plain = {(item.model, item.pair): item.picture for item in made if item.setting == f"slerp, {WEIGHTS[0]:g}"}
    for item in made:
        change = np.abs(item.picture.astype(float) - plain[item.model, item.pair])
        total = change.sum()
        inside = float(change[:, : change.shape[1] // 2].sum() / total) if total else None
        yield replace(item, inside=inside)


# --- distances ----------------------------------------------------------------------------------------------------


def _content_distance(one: edits.Pixels, other: edits.Pixels) -> float:
    a, b = (_edges(each).ravel() for each in (one, other))
    a, b = a - a.mean(), b - b.mean()
    length = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return 1 - float((a * b).sum()) / length if length else 1.0


def _edges(picture: edits.Pixels) -> PIXELS:
    """Gradient magnitude, averaged over 4 x 4 pixels."""
    down, across = np.gradient(picture.astype(float) / 255, axis=(0, 1))
    size = np.sqrt(down**2 + across**2).sum(-1)
    height, width = size.shape
    smoothed: PIXELS = size.reshape(height // 4, 4, width // 4, 4).mean((1, 3))
    return smoothed


def _style_distance(one: edits.Pixels, other: edits.Pixels) -> float:
    a, b = (each.reshape(-1, 3) / 255 for each in (one, other))
    return float(np.abs(a.mean(0) - b.mean(0)).mean() + np.abs(a.std(0) - b.std(0)).mean())


# --- tables -------------------------------------------------------------------------------------------------------


def _table(bench: Bench, made: Sequence[Drawn]) -> Table:
    rows = []
    for name in (SOURCE, *_settings(), CONTENT):
        row = []
        for model in bench.models:
            mine = [item for item in made if (item.model, item.setting) == (model, name)]
            changed = [item.inside for item in mine if item.inside is not None]
            row += [
                figures.mean_error([item.content for item in mine], 3),
                figures.mean_error([item.style for item in mine], 3),
                figures.mean_error(changed) if changed else "-",
            ]
        rows.append((name, *row))
    columns = tuple(
        figures.of(bench.models, model) + what
        for model in bench.models
        for what in ("distance from the content", "distance from the style", "change in the left half")
    )
    notes = [figures.of(bench.models, model) + claim for model in bench.models for claim in _claims(made, model)]
    return Table(
        "Distance from content and from style", ("", *columns), tuple(rows), ("Mean ± standard error.", *notes)
    )


def _claims(made: Sequence[Drawn], model: str) -> Iterator[str]:
    of = {name: {i.pair: i for i in made if (i.model, i.setting) == (model, name)} for name in _settings()}

    def gains(figure: str, better: str, worse: str) -> list[float]:
        return [getattr(of[worse][pair], figure) - getattr(of[better][pair], figure) for pair in of[better]]

    none, strong, full = (f"slerp, {weight:g}" for weight in (WEIGHTS[0], STRONG, WEIGHTS[-1]))
    yield figures.claim("Weight 1 brings the picture nearer to the content than weight 0", gains("content", full, none))
    yield figures.claim("The style stays as near at weight 0.75 as at weight 0", gains("style", strong, none))
    yield figures.claim("Slerp keeps the style better than lerp", gains("style", strong, LERP))
    yield figures.claim("Calibration keeps the style better", gains("style", CALIBRATED, strong))
    yield figures.claim("Calibration brings more of the content", gains("content", CALIBRATED, strong))
    share = [item.inside - 0.5 for item in of[REGION].values() if item.inside is not None]
    if share:
        yield figures.claim("A region keeps most of the change inside itself", share, unit=" of the change")
    reached = mean(item.content for item in of[full].values())
    yield f"At weight 1 the distance from the content is {reached:.3f} on average."


# --- pictures -----------------------------------------------------------------------------------------------------


def _sheets(bench: Bench, partners: dict[str, Case], made: Sequence[Drawn]) -> Iterator[Sheet]:
    pictures = {(item.model, item.pair, item.setting): item.picture for item in made}
    names = list(_settings())
    for model in bench.models:
        rows = [
            (case.source, partners[case.name].source, *(pictures[model, case.name, name] for name in names))
            for case in bench.shown
        ]
        heads = ("style", "content", *(f"{weight:g}" for weight in WEIGHTS), "lerp", "calibrated", "left half")
        suffix = f"-{model}" if len(bench.models) > 1 else ""
        yield Sheet(f"quality-injection{suffix}", heads, tuple(rows), abreast=1)
