"""Content injection: distances from the content and from the style image, by the weight of the injection."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from underpaint import ContentInjection

from benchmarks.cases import Case, pixels
from benchmarks.quality import edits, figures
from benchmarks.quality.bench import UNCONDITIONAL, Bench
from benchmarks.quality.section import Section, Sheet
from benchmarks.report import Table

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
MILD, STRONG = 0.25, 0.75
LERP, REGION = f"lerp, {MILD:g}", f"left half, {MILD:g}"
CALIBRATED, CALIBRATED_STRONG = (f"calibrated, {weight:g}" for weight in (MILD, STRONG))
SOURCE, CONTENT = "the style picture itself", "the content picture itself"
PIXELS = NDArray[np.float64]
CELLS = 16
ABOUT = (
    "Pairs of composites: the style picture is drawn again with the content picture's activations mixed into "
    "the network's middle block at every step ({steps} steps, injected down to 40 % of the noise schedule, guidance 1, "
    "empty prompts). Distances are taken from the picture to its two sources, at the model's size. Content is where "
    "the edges are: 1 minus the correlation of the two pictures' gradient magnitudes, smoothed; it does not see "
    "colour. Style is the colours: the difference of the means and standard deviations of the channels. Both are 0 for "
    "equal pictures; rows of the two sources themselves give the scale. The paper's setting, where its claims are to "
    "be judged, is an unconditional network on pixels{unconditional}. A latent network's middle block is small, and "
    "its skip connections carry most of a picture past it. The embedded unconditional model was trained on plain "
    "backgrounds, while about a quarter of the pictures have a pattern."
)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The measures of one injection, or of one of its two source images."""

    model: str
    setting: str
    pair: str
    content: float
    """Distance from the content image, [0, 2]."""
    style: float
    """Distance from the style image, >= 0."""
    inside: float | None
    """Share of the change that lies in the left half, [0, 1]; None if nothing changed."""
    picture: edits.Pixels = field(repr=False)

    def plain(self) -> dict[str, Any]:
        """All fields but the picture."""
        return {name: value for name, value in asdict(self).items() if name != "picture"}


@dataclass(frozen=True, slots=True)
class Pair:
    """A style image and a content image for one model."""

    model: str
    style: Case
    content: Case


def study(bench: Bench) -> Section:
    """Measure the weights of :data:`WEIGHTS`, each option at a mild weight, and calibration at a strong weight."""
    pairs = [pair for model in _models(bench) for pair in _pairs(bench, model)]
    made: list[Drawn] = []
    for name, method in _settings().items():
        made += bench.all_of(f"content injection, {name}", pairs, partial(_draw, bench, name, method))
    made = [*_sources(pairs, made), *_with_change(made)]
    models = _models(bench)
    digests = {model.name: model.digest for model in bench.client.models()}
    own = f", here '{UNCONDITIONAL}' (weights {digests[f'models/{UNCONDITIONAL}'][:12]})"
    return Section(
        title="Content injection",
        about=ABOUT.format(**bench.counts, unconditional=own),
        tables=tuple(_table(models, model, made) for model in models),
        sheets=tuple(_sheets(bench, pairs, made)),
        figures={"drawn": [item.plain() for item in made]},
    )


def _models(bench: Bench) -> tuple[str, ...]:
    """The compared models and the unconditional model."""
    return (*bench.models, UNCONDITIONAL)


def _pairs(bench: Bench, model: str) -> list[Pair]:
    """Every case as the style image, with the case half the list away, which is of another kind, as the content."""
    half = len(bench.cases) // 2
    contents = [*bench.cases[half:], *bench.cases[:half]]
    return [Pair(model, style, content) for style, content in zip(bench.cases, contents, strict=True)]


def _settings() -> dict[str, dict[str, Any]]:
    left = np.zeros((64, 64), np.uint8)
    left[:, :32] = 255
    curve = {f"slerp, {weight:g}": {"weight": weight} for weight in WEIGHTS}
    return curve | {
        LERP: {"weight": MILD, "interpolation": "lerp"},
        CALIBRATED: {"weight": MILD, "calibration": 0.5},
        REGION: {"weight": MILD, "region": Image.fromarray(left)},
        CALIBRATED_STRONG: {"weight": STRONG, "calibration": 0.5},
    }


def _draw(bench: Bench, name: str, options: dict[str, Any], pair: Pair) -> Drawn:
    method = ContentInjection(content=pair.content.photo, steps=bench.steps, **options)
    answer = bench.client.edit(pair.style.photo, "", method, guidance_scale=1.0, seed=edits.SEED, model=pair.model)
    return _drawn(name, pair, pixels(answer.image))


def _sources(pairs: Sequence[Pair], made: Sequence[Drawn]) -> Iterator[Drawn]:
    """The measures of both images of every pair, at the model's size."""
    sizes = {item.model: item.picture.shape for item in made}
    for pair in pairs:
        for name, case in ((SOURCE, pair.style), (CONTENT, pair.content)):
            yield _drawn(name, pair, _sized(case.source, sizes[pair.model]))


def _drawn(name: str, pair: Pair, picture: edits.Pixels) -> Drawn:
    content, style = (_sized(case.source, picture.shape) for case in (pair.content, pair.style))
    distances = _content_distance(picture, content), _style_distance(picture, style)
    return Drawn(pair.model, name, pair.style.name, *distances, None, picture)


def _sized(picture: edits.Pixels, shape: tuple[int, ...]) -> edits.Pixels:
    """The image resized as the server resizes, to ``shape`` (height, width, 3)."""
    image = Image.fromarray(picture)
    return pixels(image.resize((shape[1], shape[0]), Image.Resampling.LANCZOS))


def _with_change(made: Sequence[Drawn]) -> Iterator[Drawn]:
    """The same measures with ``inside``: where each image differs from the one of weight 0."""
    plain = {(item.model, item.pair): item.picture for item in made if item.setting == f"slerp, {WEIGHTS[0]:g}"}
    for item in made:
        change = np.abs(item.picture.astype(float) - plain[item.model, item.pair])
        total = change.sum()
        inside = float(change[:, : change.shape[1] // 2].sum() / total) if total else None
        yield replace(item, inside=inside)


# --- distances ----------------------------------------------------------------------------------------------------


def _content_distance(one: edits.Pixels, other: edits.Pixels) -> float:
    a, b = (_edges(picture).ravel() for picture in (one, other))
    a, b = a - a.mean(), b - b.mean()
    length = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return 1 - float((a * b).sum()) / length if length else 1.0


def _edges(picture: edits.Pixels) -> PIXELS:
    """Gradient magnitude, averaged over each cell of a grid of 16 x 16."""
    down, across = np.gradient(picture.astype(float) / 255, axis=(0, 1))
    size = np.sqrt(down**2 + across**2).sum(-1)
    down_by, across_by = (length // CELLS for length in size.shape)
    smoothed: PIXELS = size.reshape(CELLS, down_by, CELLS, across_by).mean((1, 3))
    return smoothed


def _style_distance(one: edits.Pixels, other: edits.Pixels) -> float:
    a, b = (picture.reshape(-1, 3) / 255 for picture in (one, other))
    return float(np.abs(a.mean(0) - b.mean(0)).mean() + np.abs(a.std(0) - b.std(0)).mean())


# --- tables -------------------------------------------------------------------------------------------------------


def _table(models: Sequence[str], model: str, made: Sequence[Drawn]) -> Table:
    rows = []
    for name in (SOURCE, *_settings(), CONTENT):
        mine = [item for item in made if (item.model, item.setting) == (model, name)]
        changed = [item.inside for item in mine if item.inside is not None]
        rows.append((
            name,
            figures.mean_error([item.content for item in mine], 3),
            figures.mean_error([item.style for item in mine], 3),
            figures.mean_error(changed) if changed else "-",
        ))  # fmt: skip
    caption = f"{figures.of(models, model)}Distance from content and from style"
    columns = ("", "distance from the content", "distance from the style", "change in the left half")
    count = sum(item.model == model and item.setting == SOURCE for item in made)
    note = f"Mean ± standard error of {count} pairs."
    return Table(caption, columns, tuple(rows), (note, *_claims(made, model)))


def _claims(made: Sequence[Drawn], model: str) -> Iterator[str]:
    of = {name: {i.pair: i for i in made if (i.model, i.setting) == (model, name)} for name in _settings()}

    def gains(figure: str, better: str, worse: str) -> list[float]:
        return [getattr(of[worse][pair], figure) - getattr(of[better][pair], figure) for pair in of[better]]

    none, mild, _, strong, full = (f"slerp, {weight:g}" for weight in WEIGHTS)
    yield figures.claim(
        "Weight 0.25 brings the picture nearer to the content than weight 0", gains("content", mild, none)
    )
    yield figures.claim("Weight 1 brings the picture nearer to the content than weight 0", gains("content", full, none))
    yield figures.claim("The style stays as near at weight 0.25 as at weight 0", gains("style", mild, none))
    yield figures.claim("The style stays as near at weight 0.75 as at weight 0", gains("style", strong, none))
    yield figures.claim("Slerp keeps the style better than lerp", gains("style", mild, LERP))
    for weight, without, calibrated in ((MILD, mild, CALIBRATED), (STRONG, strong, CALIBRATED_STRONG)):
        at = f"at weight {weight:g}"
        yield figures.claim(f"Calibration keeps the style better {at}", gains("style", calibrated, without))
        yield figures.claim(f"Calibration brings more of the content {at}", gains("content", calibrated, without))
    share = [item.inside - 0.5 for item in of[REGION].values() if item.inside is not None]
    if share:
        yield figures.claim("A region keeps most of the change inside itself", share, unit=" of the change")
    reached = mean(item.content for item in of[full].values())
    yield f"At weight 1 the distance from the content is {reached:.3f} on average."


# --- pictures -----------------------------------------------------------------------------------------------------


def _sheets(bench: Bench, pairs: Sequence[Pair], made: Sequence[Drawn]) -> Iterator[Sheet]:
    pictures = {(item.model, item.pair, item.setting): item.picture for item in made}
    shown = {case.name for case in bench.shown}
    names = (SOURCE, CONTENT, *_settings())
    heads = ("style", "content", *(name.removeprefix("slerp, ") for name in _settings()))
    models = _models(bench)
    for model in models:
        mine = [pair for pair in pairs if pair.model == model and pair.style.name in shown]
        rows = [tuple(_large(pictures[model, pair.style.name, name]) for name in names) for pair in mine]
        yield Sheet(f"quality-injection-{model}", heads, tuple(rows), abreast=1)


def _large(picture: edits.Pixels) -> edits.Pixels:
    """The image at twice its size if it is small, without smoothing."""
    return picture.repeat(2, 0).repeat(2, 1) if len(picture) < 64 else picture
