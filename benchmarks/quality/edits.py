"""Edits by several methods and their measures against the known answers."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from underpaint import Ddim, DiffEdit, Edict, SdEdit
from underpaint.methods import EditMethod

from benchmarks import served
from benchmarks.cases import Case, pixels
from benchmarks.quality import figures
from benchmarks.quality.bench import Bench
from benchmarks.report import Table

Pixels = NDArray[np.uint8]
UNEDITED, AUTOENCODER, TRUE = "unedited source", "autoencoder alone", "true target"
METHODS: dict[str, EditMethod] = {
    "SDEdit, strength 0.6": SdEdit(strength=0.6),
    "SDEdit, strength 0.8": SdEdit(strength=0.8),
    "DDIM": Ddim(strength=0.8),
    "EDICT": Edict(strength=0.8),
    "DiffEdit": DiffEdit(strength=0.8, threshold=0.5, mask_strength=0.5),
}
"""Name in the tables -> method; all settings are the server's defaults, except SDEdit's strength of 0.6."""
SEED = 1


@dataclass(frozen=True, slots=True)
class Judged:
    """The measures of one image for a case."""

    model: str
    method: str
    case: str
    kind: str
    success: bool
    """Whether the judge's similarity to the target caption is larger than to the source caption."""
    similarity: float
    """The judge's cosine similarity of the image and the target caption, [-1, 1]."""
    target_mse: float
    """Mean squared error against the true target, pixels in [0, 1]."""
    outside_mse: float
    """Mean squared error against the source outside the true region, pixels in [0, 1]."""
    picture: Pixels = field(repr=False)

    def plain(self) -> dict[str, Any]:
        """All fields but the picture."""
        return {name: value for name, value in asdict(self).items() if name != "picture"}


def judged(bench: Bench, model: str, method: str, case: Case, picture: Pixels) -> Judged:
    """Measure ``picture``, (64, 64, 3)."""
    source, target = bench.judge.similarity(picture, (case.source_prompt, case.target_prompt))
    return Judged(
        model, method, case.name, case.kind, target > source, target, _mse(picture, case.target),
        _mse(picture, case.source, ~case.region), picture,
    )  # fmt: skip


def at_case_size(image: Image.Image, case: Case) -> Pixels:
    """Pixels of an image, resized to the case's size if a model has another."""
    size = (case.source.shape[1], case.source.shape[0])
    return pixels(image if image.size == size else image.resize(size, Image.Resampling.LANCZOS))


def standard(bench: Bench) -> list[Judged]:
    """The reference images and the edits by all of :data:`METHODS` for every case, computed once per run."""
    if "standard" not in bench.memory:
        results = [item for items in bench.each("references", lambda m, c: _references(bench, m, c)) for item in items]
        for name, method in METHODS.items():
            results += bench.each(name, lambda m, c, n=name, how=method: _edit(bench, m, c, n, how))  # type: ignore[misc]
        bench.memory["standard"] = results
    made: list[Judged] = bench.memory["standard"]
    return made


def request(bench: Bench, model: str, case: Case, method: EditMethod) -> Pixels:
    """One edit by the server, with the source caption where the method takes it, and with seed :data:`SEED`."""
    how = replace(method, steps=bench.steps)
    source_prompt = case.source_prompt if isinstance(method, Edict | Ddim) else ""
    if isinstance(how, DiffEdit) and how.mask is None:
        how = replace(how, reference_prompt=case.source_prompt, samples=bench.mask_samples)
    guidance = 5.0 if isinstance(method, DiffEdit) else 3.0
    answer = bench.client.edit(
        case.photo, case.target_prompt, how, source_prompt=source_prompt, guidance_scale=guidance, seed=SEED,
        model=model,
    )  # fmt: skip
    return at_case_size(answer.image, case)


def seconds(bench: Bench, count: int) -> dict[tuple[str, str], list[float]]:
    """(model, method) -> seconds from request to response of an edit alone on the server, for ``count`` cases."""
    taken: dict[tuple[str, str], list[float]] = {}
    for model in bench.models:
        for name, method in METHODS.items():
            for case in bench.cases[:count]:
                served.forget(bench.client)
                begin = time.monotonic()
                request(bench, model, case, method)
                taken.setdefault((model, name), []).append(time.monotonic() - begin)
    return taken


def tables(
    bench: Bench, results: Sequence[Judged], names: Sequence[str], claims: Callable[[Sequence[Judged]], Iterable[str]]
) -> Iterator[Table]:
    """Tables of success, both errors and similarity by kind of edit, and of each further model against the first.

    ``names`` are the methods of the rows. ``claims`` makes sentences from the edits of one model; they are printed
    under the first table.
    """
    notes = [
        figures.of(bench.models, model) + claim
        for model in bench.models
        for claim in claims([item for item in results if item.model == model])
    ]
    yield _table(bench, results, names, "Edits that succeed", _success, [
        f"Share ± standard error. The judge itself accepts {_share(results, TRUE)} of the true targets and "
        f"{_share(results, UNEDITED)} of the unedited sources as what was asked for: read every share between those "
        "two. A smear of the right colours can please the judge: read it beside the errors and the pictures.", *notes,
    ])  # fmt: skip
    yield _table(bench, results, names, "Error to the true target (mean squared, times 1000)", _target_error, [
        "Median [quartiles]; pixels in [0, 1]. A right picture that is not the true target counts as an error here, so"
        " an edit may succeed and lie farther off than the unedited source."
    ])  # fmt: skip
    yield _table(bench, results, names, "Error outside the true region (mean squared, times 1000)", _outside_error, [
        "Median [quartiles], edit against photo. No edit that is decoded comes closer than 'autoencoder alone'; true "
        "targets differ a little from their photos, since soft edges reach beyond the region."
    ])  # fmt: skip
    yield _table(bench, results, names, "Similarity of picture and target caption", _similarity, [
        "Mean ± standard error of the judge's cosine."
    ])  # fmt: skip
    edited = [name for name in names if name not in (UNEDITED, AUTOENCODER, TRUE)]
    yield from (_versus(bench.models[0], model, results, edited) for model in bench.models[1:])


def gains(results: Sequence[Judged], better: str, worse: str, figure: Callable[[Judged], float]) -> list[float]:
    """Paired differences of a figure over one model's cases, ``better`` minus ``worse``."""
    by_case = {item.case: figure(item) for item in results if item.method == worse}
    return [figure(item) - by_case[item.case] for item in results if item.method == better]


def outside(item: Judged) -> float:
    """The negative error outside the true region, times 1000; larger is better."""
    return -1000 * item.outside_mse


def target(item: Judged) -> float:
    """The negative error to the true target, times 1000; larger is better."""
    return -1000 * item.target_mse


def points(item: Judged) -> float:
    """Success in percentage points: 100 or 0."""
    return 100.0 * item.success


def _references(bench: Bench, model: str, case: Case) -> list[Judged]:
    kept = Image.fromarray(served.through_autoencoder(bench.client, case, model))
    shown = {UNEDITED: case.source, AUTOENCODER: at_case_size(kept, case), TRUE: case.target}
    return [judged(bench, model, name, case, picture) for name, picture in shown.items()]


def _edit(bench: Bench, model: str, case: Case, name: str, method: EditMethod) -> Judged:
    return judged(bench, model, name, case, request(bench, model, case, method))


def _mse(one: Pixels, other: Pixels, region: NDArray[np.bool_] | None = None) -> float:
    squared = np.square((one.astype(np.float64) - other) / 255)
    return float((squared if region is None else squared[region]).mean())


def _table(
    bench: Bench, results: Sequence[Judged], names: Sequence[str], caption: str,
    cell: Callable[[Sequence[Judged]], str], notes: Sequence[str],
) -> Table:  # fmt: skip
    rows = []
    for name in names:
        mine = [item for item in results if item.method == name]
        rows.append((name, *figures.cells(mine, lambda i: i.model, lambda i: i.kind, bench.models, cell)))
    return Table(caption, ("", *figures.columns(bench.models)), tuple(rows), tuple(notes))


def _versus(first: str, other: str, results: Sequence[Judged], names: Sequence[str]) -> Table:
    """Paired differences of two models on the same cases."""
    shown: dict[str, Callable[[Judged], float]] = {
        "success, points": points,
        "error to the target x 1000": lambda item: 1000 * item.target_mse,
        "error outside x 1000": lambda item: 1000 * item.outside_mse,
        "similarity": lambda item: item.similarity,
    }
    before = {(i.method, i.case): i for i in results if i.model == first}
    rows = []
    for name in names:
        mine = [item for item in results if (item.model, item.method) == (other, name)]
        row = [
            figures.mean_error([figure(item) - figure(before[name, item.case]) for item in mine], 2)
            for figure in shown.values()
        ]
        rows.append((name, *row))
    note = f"{other} minus {first}, mean ± standard error of the differences on the same cases."
    return Table(f"{other} against {first}", ("", *shown), tuple(rows), (note,))


def _success(items: Sequence[Judged]) -> str:
    return figures.share([item.success for item in items])


def _target_error(items: Sequence[Judged]) -> str:
    return figures.quartiles([1000 * item.target_mse for item in items], 1)


def _outside_error(items: Sequence[Judged]) -> str:
    return figures.quartiles([1000 * item.outside_mse for item in items], 1)


def _similarity(items: Sequence[Judged]) -> str:
    return figures.mean_error([item.similarity for item in items])


def _share(results: Sequence[Judged], method: str) -> str:
    return f"{mean(item.success for item in results if item.method == method):.2f}"
