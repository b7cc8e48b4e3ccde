"""Disentangled edits: learned mixing weights against a switch of the prompt, on training and on unseen images."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import mean
from typing import Any

from underpaint import Disentangled, GradientLearning
from underpaint.results import Direction

from benchmarks.cases import KINDS, Case
from benchmarks.quality import edits, figures
from benchmarks.quality.bench import Bench, bar
from benchmarks.quality.section import Section, Sheet
from benchmarks.report import Table

GUIDANCE = 5.0
LEARNED, SWITCH, SWAP = "learned weights", "switch only", "full swap"
UNTOUCHED = "weight 1 everywhere"
BESIDE = ("SDEdit, strength 0.6", "SDEdit, strength 0.8")
TRAINED, UNSEEN = "training picture", "unseen pictures"
ABOUT = (
    "One direction is learned for each kind of edit, on the first case of that kind alone, and its weights are "
    "used on all other cases of the kind with their own captions: weights say when to follow which prompt, and "
    "the prompts may change. {steps} steps, DDIM, guidance 5, the learning defaults of the server ({iterations} "
    "optimiser steps; weights start as 1 for two fifths of the steps and 0 after). 'Switch only' is that start, "
    "not learned; 'full swap' follows the target prompt from the first step; 'weight 1 everywhere' is the photo "
    "brought back by its residuals. All of them bring the photo along by its residuals; SDEdit does not. The "
    "tables of success, errors and similarity are of the unseen pictures alone. The direction is the cosine "
    "between the change of the picture and the change of the caption, to the judge, which is also the CLIP that "
    "the weights were learned by: where learning gains on it, look at the other tables too."
)


def study(bench: Bench) -> Section:
    """Learn one direction for each kind of edit, then edit every case with and without the learned weights."""
    learned = {(model, kind): _learn(bench, model, kind) for model in bench.models for kind in KINDS}
    made: list[edits.Judged] = []
    for name, how in _METHODS.items():
        made += bench.each(name, partial(_edit, bench, learned, name, how))
    beside = [item for item in edits.standard(bench) if item.method in (edits.UNEDITED, edits.TRUE, *BESIDE)]
    results = [*beside, *made]
    names = [edits.UNEDITED, UNTOUCHED, SWAP, SWITCH, LEARNED, *BESIDE, edits.TRUE]
    firsts = {_first(bench, kind).name for kind in KINDS}
    return Section(
        title="Disentangled edits",
        about=ABOUT.format(**bench.counts, iterations=_iterations(bench) or 10),
        tables=(
            _directions(bench, results, names, firsts),
            _losses(bench, learned),
            *edits.tables(bench, [i for i in results if i.case not in firsts] or results, names, _claims),
        ),
        sheets=tuple(_sheets(bench, made)),
        figures={
            "edits": [item.plain() | {"direction": _direction(bench, item)} for item in results],
            "directions": {f"{model} {kind}": list(d.weights) for (model, kind), d in learned.items()},
            "losses": {f"{model} {kind}": list(d.losses) for (model, kind), d in learned.items()},
        },
    )


# --- learn and edit -----------------------------------------------------------------------------------------------


def _first(bench: Bench, kind: str) -> Case:
    return next(case for case in bench.cases if case.kind == kind)


def _iterations(bench: Bench) -> int | None:
    """Optimiser steps of a quick run; None, the server's default, otherwise."""
    return 2 if bench.quick else None


def _learn(bench: Bench, model: str, kind: str) -> Direction:
    case = _first(bench, kind)
    with bar() as shown:
        task = shown.add_task(f"{model}: learn {kind}", total=1.0)
        learning = bench.client.learn(
            case.source_prompt, case.target_prompt, [case.photo], steps=bench.steps, guidance_scale=GUIDANCE,
            method=GradientLearning(optimization_steps=_iterations(bench)), seed=edits.SEED, model=model,
        )  # fmt: skip
        return learning.result(progress=lambda p: shown.update(task, completed=p.fraction))


Learned = dict[tuple[str, str], Direction]
How = Callable[[Bench, Direction], Disentangled]

_METHODS: dict[str, How] = {
    UNTOUCHED: lambda bench, _: Disentangled(weights=[1.0] * bench.steps),
    SWAP: lambda bench, _: Disentangled(weights=[0.0] * bench.steps),
    SWITCH: lambda bench, _: Disentangled(switch_step=2 * bench.steps // 5, steps=bench.steps),
    LEARNED: lambda _, direction: Disentangled(weights=direction.weights),
}


def _edit(bench: Bench, learned: Learned, name: str, how: How, model: str, case: Case) -> edits.Judged:
    answer = bench.client.edit(
        case.photo, case.target_prompt, how(bench, learned[model, case.kind]), source_prompt=case.source_prompt,
        guidance_scale=GUIDANCE, seed=edits.SEED, model=model,
    )  # fmt: skip
    return edits.judged(bench, model, name, case, edits.at_case_size(answer.image, case))


# --- tables -------------------------------------------------------------------------------------------------------


def _direction(bench: Bench, item: edits.Judged) -> float:
    case = next(case for case in bench.cases if case.name == item.case)
    return bench.judge.direction(case.source, item.picture, case.source_prompt, case.target_prompt)


def _directions(bench: Bench, results: Sequence[edits.Judged], names: Sequence[str], firsts: set[str]) -> Table:
    rows = []
    for name in names[1:]:  # the unedited source has no direction
        row = []
        for model in bench.models:
            mine = [item for item in results if (item.model, item.method) == (model, name)]
            for inside in (True, False):
                chosen = [item for item in mine if (item.case in firsts) is inside]
                row += [
                    figures.mean_error([_direction(bench, i) for i in chosen]) if chosen else "-",
                    figures.quartiles([1000 * i.outside_mse for i in chosen], 1) if chosen else "-",
                ]
        rows.append((name, *row))
    columns = tuple(
        figures.of(bench.models, model) + f"{which}: {what}"
        for model in bench.models
        for which in (TRAINED, UNSEEN)
        for what in ("direction", "error outside x 1000")
    )
    counts = f"{len(firsts)} training pictures, {len(bench.cases) - len(firsts)} unseen ones."
    note = f"Direction: mean ± standard error; error outside the true region: median [quartiles]. {counts}"
    return Table("Direction of the change against content lost", ("", *columns), tuple(rows), (note,))


def _losses(bench: Bench, learned: Learned) -> Table:
    rows = []
    for (model, kind), direction in learned.items():
        early, late = direction.weights[: bench.steps // 2], direction.weights[bench.steps // 2 :]
        rows.append((
            figures.of(bench.models, model) + kind, f"{direction.losses[0]:.3f}", f"{min(direction.losses):.3f}",
            f"{mean(early):.2f}", f"{mean(late):.2f}",
        ))  # fmt: skip
    columns = ("", "loss at the start", "smallest loss", "mean weight, noisier half", "mean weight, cleaner half")
    return Table("What was learned", columns, tuple(rows), ("One training picture each: no spread.",))


def _claims(results: Sequence[edits.Judged]) -> Iterator[str]:
    """Claims about the unseen images."""
    error = " of MSE x 1000"
    for rival in (SWITCH, SWAP):
        wins = edits.gains(results, LEARNED, rival, edits.points)
        yield figures.claim(f"Learned weights succeed more often than {rival}", wins, unit=" points", digits=1)
        keeps = edits.gains(results, LEARNED, rival, edits.outside)
        yield figures.claim(f"Learned weights keep more outside the region than {rival}", keeps, unit=error, digits=2)
    keeps = edits.gains(results, SWITCH, SWAP, edits.outside)
    yield figures.claim("A switch keeps more outside the region than the full swap", keeps, unit=error, digits=2)
    keeps = edits.gains(results, LEARNED, BESIDE[1], edits.outside)
    yield figures.claim("Learned weights keep more outside than SDEdit at 0.8", keeps, unit=error, digits=2)


# --- pictures -----------------------------------------------------------------------------------------------------


def _sheets(bench: Bench, made: Sequence[edits.Judged]) -> Iterator[Sheet]:
    pictures: dict[Any, edits.Pixels] = {(item.model, item.case, item.method): item.picture for item in made}
    for model in bench.models:
        rows = [
            (case.source, *(pictures[model, case.name, name] for name in _METHODS), case.target) for case in bench.shown
        ]
        suffix = f"-{model}" if len(bench.models) > 1 else ""
        yield Sheet(
            f"quality-disentangled{suffix}", ("photo", "weight 1", "swap", "switch", "learned", "true"), tuple(rows)
        )
