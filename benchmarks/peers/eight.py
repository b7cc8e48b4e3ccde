"""Eight edits, all there from the beginning: every contender's seconds in one interleaved run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from time import perf_counter

from rich.progress import Progress
from underpaint import Client

from benchmarks import served
from benchmarks.peers.edits import Edit, Pixels, make, pixels, worst_psnr_db
from benchmarks.peers.lockstep import Lockstep
from benchmarks.peers.loops import Loops
from benchmarks.peers.setup import AT_ONCE, Scale
from benchmarks.report import Table, console, spread

METHODS = ("sdedit", "diffedit", "edict", "ddim")
ONE_EDICT = "one EDICT"
ALONE, AT_THE_SAME_TIME, BATCH = "one by one", "at once", "static batch"
OURS = "our server"
FLOOR_DB = {"float32": 50.0, "half": 20.0}
"""Smallest PSNR against the reference of a network with the reference's precision, and of one in half precision."""
CHECK_FLOOR_DB = {"float32": 50.0, "half": 25.0}
"""The same in the check before anything is timed, which has fewer steps: errors grow with their number."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute edits."""

    name: str
    sent: str
    """How it gets several edits."""
    precision: str
    """A key of :data:`FLOOR_DB`."""
    run: Callable[[Sequence[Edit]], list[Pixels]]
    slow: bool = False
    """Takes part in ``Scale.slow_rounds`` rounds only."""
    only: str = ""
    """The only workload that it takes part in; empty for all."""

    @property
    def label(self) -> str:
        """Its name and how it gets the edits."""
        return f"{self.name}, {self.sent}" if self.sent else self.name

    def takes(self, workload: str) -> bool:
        """Whether it takes part in a workload."""
        if self.only:
            return self.only == workload
        return workload != ONE_EDICT or self.sent == ALONE


@dataclass(slots=True)
class Outcome:
    """All rounds of one workload."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Label of a contender -> seconds of each of its rounds."""
    worst_db: dict[str, float] = field(default_factory=dict)
    """Label of a contender -> smallest PSNR of a picture against the reference."""

    def ratio(self, label: str, other: str) -> list[float]:
        """Seconds of ``label`` over those of ``other``, for each round that had both."""
        return [a / b for a, b in zip(self.seconds[label], self.seconds[other], strict=False)]


def workloads(steps: int) -> dict[str, list[Edit]]:
    """Name -> edits; they differ in photo, prompts and seed."""
    found = {
        f"{AT_ONCE} x {title}": [make(method, k, steps) for k in range(AT_ONCE)]
        for title, method in (("SDEdit", "sdedit"), ("DiffEdit", "diffedit"), ("EDICT", "edict"))
    }
    found["four methods"] = [make(METHODS[k % len(METHODS)], k, steps) for k in range(AT_ONCE)]
    found[ONE_EDICT] = [make("edict", 0, steps)]
    return found


def of_loops(name: str, precision: str, loops: Loops, *, slow: bool) -> list[Contender]:
    """A diffusers loop as two contenders: one edit after another, and in static batches of one method each."""

    def alone(edits: Sequence[Edit]) -> list[Pixels]:
        return [picture for edit in edits for picture in loops.run([edit])]

    return [
        Contender(name, ALONE, precision, alone, slow),
        Contender(name, BATCH, precision, partial(_batches, loops), slow),
    ]


def of_server(client: Client, precision: str) -> list[Contender]:
    """Our server as two contenders: one edit after another, and all at once."""

    def alone(edits: Sequence[Edit]) -> list[Pixels]:
        return [pixels(client.edit(**edit.call()).image_bytes) for edit in edits]

    def at_once(edits: Sequence[Edit]) -> list[Pixels]:
        answers = served.at_once([partial(client.edit, **edit.call()) for edit in edits])
        return [pixels(answer.image_bytes) for answer in answers]

    return [
        Contender(OURS, ALONE, precision, alone),
        Contender(OURS, AT_THE_SAME_TIME, precision, at_once),
    ]


def measure(scale: Scale, contenders: Sequence[Contender], reference: Lockstep, client: Client) -> dict[str, Outcome]:
    """Check every contender's pictures, then time all of them in turn; ends the benchmark where pictures differ."""
    _check(scale, contenders, reference, client)
    work = workloads(scale.steps)
    truth = {name: [result.pixels for result in reference.run([edit.job() for edit in edits])]
             for name, edits in work.items()}  # fmt: skip
    turns = [
        (workload, contender)
        for number in range(scale.rounds)
        for workload in work
        for contender in contenders
        if contender.takes(workload) and (not contender.slow or number < scale.slow_rounds)
    ]
    outcomes = {workload: Outcome() for workload in work}
    pictures: dict[tuple[str, str], list[Pixels]] = {}
    with Progress(console=console) as progress:
        task = progress.add_task("eight edits", total=len(turns))
        for workload, contender in turns:
            progress.update(task, description=f"{workload}: {contender.label}")
            served.forget(client)
            began = perf_counter()
            made = contender.run(work[workload])
            seconds = perf_counter() - began
            outcome = outcomes[workload]
            outcome.seconds.setdefault(contender.label, []).append(seconds)
            worst = _refuse(contender, workload, made, truth[workload], FLOOR_DB)
            outcome.worst_db[contender.label] = min(worst, outcome.worst_db.get(contender.label, 99.0))
            pictures[workload, contender.label] = made
            progress.advance(task)
    _refuse_unequal(pictures)
    return outcomes


def _batches(loops: Loops, edits: Sequence[Edit]) -> list[Pixels]:
    """One static batch for each kind of edit; the pictures in the order of ``edits``."""
    kinds = dict.fromkeys(edit.kind for edit in edits)
    made: dict[int, Pixels] = {}
    for kind in kinds:
        numbers = [i for i, edit in enumerate(edits) if edit.kind == kind]
        made.update(zip(numbers, loops.run([edits[i] for i in numbers]), strict=True))
    return [made[i] for i in range(len(edits))]


def _check(scale: Scale, contenders: Sequence[Contender], reference: Lockstep, client: Client) -> None:
    """Compare all contenders' pictures with the reference's, before anything is timed; it is their warm-up too."""
    work = workloads(scale.check_steps)
    truth = {name: [result.pixels for result in reference.run([edit.job() for edit in edits])]
             for name, edits in work.items()}  # fmt: skip
    with Progress(console=console) as progress:
        turns = [(name, contender) for name in work for contender in contenders if contender.takes(name)]
        task = progress.add_task("checking outputs", total=len(turns))
        for name, contender in turns:
            progress.update(task, description=f"checking {contender.label}")
            served.forget(client)
            _refuse(contender, name, contender.run(work[name]), truth[name], CHECK_FLOOR_DB)
            progress.advance(task)


def _refuse(
    contender: Contender, workload: str, made: list[Pixels], truth: list[Pixels], floors: dict[str, float]
) -> float:
    worst = worst_psnr_db(made, truth)
    if worst < floors[contender.precision]:
        raise SystemExit(
            f"{contender.label}, {workload}: a picture has {worst:.1f} dB against the float32 reference, and "
            f"{floors[contender.precision]:.0f} dB are required; it does not do the same work, so nothing is compared"
        )
    return worst


def _refuse_unequal(pictures: dict[tuple[str, str], list[Pixels]]) -> None:
    """Our server's answers must have the same bytes alone and at once."""
    for (workload, label), made in pictures.items():
        if label != f"{OURS}, {AT_THE_SAME_TIME}":
            continue
        alone = pictures[workload, f"{OURS}, {ALONE}"]
        unequal = [i for i, (one, other) in enumerate(zip(made, alone, strict=True)) if (one != other).any()]
        if unequal:
            raise SystemExit(f"our server, {workload}: edits {unequal} gave other bytes at once than alone")


# --- tables -----------------------------------------------------------------------------------------------------


def tables(outcomes: dict[str, Outcome]) -> list[Table]:
    """Seconds of every contender, and the same as multiples of our server's."""
    names = list(outcomes)
    labels = list(dict.fromkeys(label for outcome in outcomes.values() for label in outcome.seconds))
    seconds = tuple(
        (label, *(spread(outcomes[name].seconds[label]) if label in outcomes[name].seconds else "" for name in names))
        for label in labels
    )
    ratios = tuple((label, *(_ratio(outcomes[name], label) for name in names)) for label in labels)
    worst = tuple(
        (label, *(_db(outcomes[name].worst_db.get(label)) for name in names)) for label in labels
    )  # fmt: skip
    return [
        Table("Eight edits, seconds", ("contender", *names), seconds),
        Table(
            "The same over our server's seconds in the same round",
            ("contender", *names),
            ratios,
            ("Above 1 is slower than our server, which gets the eight edits at once, and a single one alone.",),
        ),
        Table(
            "Smallest PSNR of a picture against our float32 result, dB",
            ("contender", *names),
            worst,
            ("99 stands for equal pictures. An edit multiplies the rounding of a half-precision network, EDICT most.",),
        ),
    ]


def best_of_ours(outcome: Outcome) -> str:
    """The label of our server that others are compared with."""
    at_once = f"{OURS}, {AT_THE_SAME_TIME}"
    return at_once if at_once in outcome.seconds else f"{OURS}, {ALONE}"


def _ratio(outcome: Outcome, label: str) -> str:
    return spread(outcome.ratio(label, best_of_ours(outcome))) if label in outcome.seconds else ""


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def seconds(outcome: Outcome, label: str) -> float:
    """Median seconds of a contender."""
    return median(outcome.seconds[label])
