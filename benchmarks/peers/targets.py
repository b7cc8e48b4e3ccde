"""What the server is meant to reach on two cores with AMX, beside what this run measured."""

from collections.abc import Mapping
from statistics import median

from benchmarks.peers import load, passes
from benchmarks.peers.eight import ALONE, AT_THE_SAME_TIME, BATCH, ONE_EDICT, OURS, Outcome
from benchmarks.peers.load import Sweep
from benchmarks.peers.passes import Measured
from benchmarks.report import Table

OPENVINO, FLOAT32, BFLOAT16 = "diffusers, OpenVINO U-Net", "diffusers, float32", "diffusers, bfloat16"
OFFICIAL = "EDICT in float64, as its authors compute it"
TORCH = "our methods on torch, float32"
LOAD = 0.8
"""Load factor at which request-level batching is compared."""
_AT_ONCE = f"{OURS}, {AT_THE_SAME_TIME}"


def table(outcomes: Mapping[str, Outcome], sweep: Sweep, alone: Measured, gain: float) -> Table:
    """Every target with the worst figure of this run; ``gain`` is that of short edits while a direction is learned."""
    rates = sweep.rows_per_s
    torch_best = alone.best(passes.TORCH)
    rows = [
        _at_least("network rows/s, saturated, injections among them", 450, rates[load.OURS], 0),
        _at_least("the same over the torch backend's best pass", 4, rates[load.OURS] / torch_best),
        *_closed(outcomes, f"{OPENVINO}, {BATCH}", 1.0),
        *_closed(outcomes, f"{FLOAT32}, {ALONE}", 0.2),
    ]
    single, ours = outcomes[ONE_EDICT], f"{OURS}, {ALONE}"
    if TORCH in single.seconds:
        rows.append(_at_most("a single EDICT over the same on torch", 0.2, median(single.ratio(ours, TORCH))))
    if LOAD in {point.factor for point in sweep.points}:
        mine = sweep.point(load.OURS, LOAD).summary.p95_s
        rows += [
            _at_least(f"p95 of {name} over ours at load {LOAD}", 2, sweep.point(name, LOAD).summary.p95_s / mine)
            for name in rates
            if name != load.OURS
        ]
    rows.append(_at_least("first come, first served over p95 of short edits while learning", 10, gain))
    note = "The targets are of two cores with AMX; elsewhere the ratios say more than the first line."
    return Table("Targets", ("figure", "target", "measured", "met"), tuple(rows), (note,))


def _closed(outcomes: Mapping[str, Outcome], label: str, most: float) -> list[tuple[str, ...]]:
    """Eight edits at once over a contender: the largest median ratio of any workload."""
    found = [
        (median(outcome.ratio(_AT_ONCE, label)), name)
        for name, outcome in outcomes.items()
        if _AT_ONCE in outcome.seconds and label in outcome.seconds
    ]
    if not found:
        return []
    worst, name = max(found)
    return [_at_most(f"eight edits at once over {label} (worst: {name})", most, worst)]


def _at_least(figure: str, target: float, measured: float, digits: int = 2) -> tuple[str, ...]:
    return figure, f"at least {target:g}", f"{measured:.{digits}f}", "yes" if measured >= target else "no"


def _at_most(figure: str, target: float, measured: float) -> tuple[str, ...]:
    return figure, f"at most {target:g}", f"{measured:.2f}", "yes" if measured <= target else "no"
