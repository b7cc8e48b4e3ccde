"""The service on a GPU, in one run of under nine minutes: the device's ceiling, the networks, diffusers, the engine.

With ``--device cpu`` the same script runs on tiny networks, which tries it and measures nothing of use.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from underpaint_server.backends import load
from underpaint_server.backends.cuda import CudaRecorder
from underpaint_server.backends.model import ModelBackend
from underpaint_server.jobs import Inverted
from underpaint_server.settings import Settings

from benchmarks.gpu import bare, engine
from benchmarks.gpu.clock import Budget, peak_gib
from benchmarks.gpu.networks import FULL, TINY, Network, Scale, save_pipeline
from benchmarks.report import Report, Table, console, spread

ABOUT = (
    "{scale}, random weights, {dtype} network, float64 state, {steps} steps, strength 0.8, guidance 3. The engine is "
    "the real one, in this process, without sockets; its jobs are EDICT, DDIM, DiffEdit, SDEdit and content injection "
    "in equal parts, with prompts, photos and seeds of their own. Ratios are of times of this run. Networks alone "
    "alternate (A B A B ...); medians over {rounds} rounds, with smallest and largest."
)
NEEDS_S = {
    "ceiling": 5, "passes": 60, "side stages": 5, "saturated": 60, "solo": 40, "round trip": 30, "reuse": 20,
    "preview": 5, "diffusers": 45, "load": 60, "float64 EDICT": 15, "SDXL": 45,
}  # fmt: skip
"""Section -> seconds that it is given at full scale, in the order in which they run."""


@dataclass(slots=True)
class Measured:
    """The run so far."""

    scale: Scale
    device: torch.device
    budget: Budget
    directory: Path
    """Of the checkpoint."""
    settings: Settings
    backend: ModelBackend | None = None
    gflop: float = 0.0
    """Of one network row, in 1e9 operations."""
    values: dict[str, Any] = field(default_factory=dict)
    """Section -> what it measured."""
    peak_gib: dict[str, float] = field(default_factory=dict)
    """Section -> most memory reserved on the device."""

    @property
    def served(self) -> ModelBackend:
        """The loaded model."""
        assert self.backend is not None
        return self.backend

    def get(self, section: str, *names: Any) -> Any:
        """A value of a section; None if it was not measured."""
        value = self.values.get(section)
        for name in names:
            value = None if value is None else value[name]
        return value


def run(quick: bool, device: str = "cuda", scale: Scale | None = None) -> Report:
    """Run the benchmark; see the module. ``quick`` takes one round and a third of the steps."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu: torch finds no CUDA device; --device cpu tries the script on tiny networks")
    scale = scale or (TINY if device == "cpu" else FULL)
    if quick:
        scale = replace(scale, steps=max(4, scale.steps // 3), rounds=2, load_s=scale.load_s / 3)
    budget = Budget(60 * scale.minutes)
    with tempfile.TemporaryDirectory() as directory:
        measured = Measured(
            scale, torch.device(device), budget, Path(directory),
            Settings(backend="torch", device=device, dtype=scale.dtype, log_level="warning"),
        )  # fmt: skip
        with budget.section("loading"):
            _load(measured)
        if measured.backend is None:
            raise SystemExit(f"gpu: loading {budget.missing['loading']}")
        share = budget.left_s / (60 * FULL.minutes)
        for name, section in SECTIONS.items():
            if budget.may_begin(name, NEEDS_S[name] * min(1.0, share)):
                with budget.section(name):
                    measured.values[name] = section(measured)
                measured.peak_gib[name] = peak_gib(measured.device)
            console.print(f"{name}: {measured.values.get(name, budget.missing.get(name))}")
    return _report(measured)


# --- sections -------------------------------------------------------------------------------------------------------


def _load(measured: Measured) -> None:
    save_pipeline(measured.scale, measured.device, measured.directory)
    backend = load(str(measured.directory), "random", measured.settings)
    assert isinstance(backend, ModelBackend)
    measured.backend = backend
    measured.gflop = Network.sd15(measured.scale, measured.device).gflop()


def _ceiling(measured: Measured) -> dict[str, float]:
    return bare.ceiling(measured.scale, measured.device)


def _passes(measured: Measured) -> dict[str, dict[int, list[float]]]:
    return bare.passes(measured.scale, measured.served, measured.device)


def _side_stages(measured: Measured) -> dict[str, float]:
    return bare.side_stages(measured.served, measured.device, measured.scale.round_s)


def _diffusers(measured: Measured) -> dict[str, list[float]]:
    found = bare.diffusers_edits(measured.scale, measured.directory, measured.device)
    scale, ours = measured.scale, []
    for turn in range(scale.rounds):
        jobs = [engine.edit(measured.served, "sdedit", scale.steps, number) for number in range(scale.jobs // 2)]
        done = engine.run(measured.served, measured.settings, jobs)
        if turn > 0:
            ours.append(len(jobs) / done.total_s)
    return {**found, "our engine": ours}


def _saturated(measured: Measured) -> dict[str, Any]:
    jobs = engine.mix(measured.served, measured.scale.steps, measured.scale.jobs)
    runs = [engine.run(measured.served, measured.settings, jobs) for _ in range(measured.scale.rounds)][1:]
    return {
        "rows_per_s": [one.rows_per_s for one in runs],
        "edits_per_s": [len(jobs) / one.total_s for one in runs],
        "rows_per_pass": median(one.rows_per_pass for one in runs),
        "padding": median(one.padding for one in runs),
        "outside": median(one.outside for one in runs),
        "sizes": runs[-1].sizes,
        "total_s": runs[-1].total_s,
    }


def _solo(measured: Measured) -> dict[str, dict[str, float]]:
    found = {}
    for method in engine.METHODS:
        job = engine.edit(measured.served, method, measured.scale.steps, 1)
        runs = [engine.run(measured.served, measured.settings, [job]) for _ in range(measured.scale.rounds)][1:]
        found[method] = {
            "seconds": median(one.total_s for one in runs),
            "rows": float(runs[0].rows),
            "outside": median(one.outside for one in runs),
        }
    return found


def _round_trip(measured: Measured) -> dict[str, Any]:
    backend, settings, steps = measured.served, measured.settings, measured.scale.steps
    job = engine.round_trip(backend, steps, 7)
    alone = engine.run(backend, settings, [job]).results[0]
    busy = engine.run(backend, settings, [job, *engine.random_mix(backend, steps, measured.scale.jobs // 2)]).results[0]
    assert isinstance(alone, Inverted)
    assert isinstance(busy, Inverted)
    pairs = zip(alone.inversion.arrays.values(), busy.inversion.arrays.values(), strict=True)
    return {
        "error_alone": alone.inversion.reconstruction_max_abs_error,
        "error_busy": busy.inversion.reconstruction_max_abs_error,
        "same_bits": all(np.array_equal(one, other) for one, other in pairs),
    }


def _reuse(measured: Measured) -> dict[str, Any]:
    backend, found = measured.served, {}
    for method in ("edict", "diffedit"):
        times: dict[int | None, list[float]] = {0: [], None: []}
        rows: dict[int | None, int] = {}
        for turn in range(measured.scale.rounds):
            for photo in times:  # one photo for all edits, or one for each
                first = 2000 + 100 * turn  # other prompts and photos each time, so that nothing is kept from before
                jobs = [
                    engine.edit(backend, method, measured.scale.steps, first + k, None if photo is None else first)
                    for k in range(4)
                ]
                done = engine.run(backend, measured.settings, jobs)
                rows[photo] = done.rows
                if turn > 0:
                    times[photo].append(done.total_s)
        found[method] = {"faster": median(times[None]) / median(times[0]), "rows": rows[0], "planned": rows[None]}
    return found


def _preview(measured: Measured) -> dict[str, float | None]:
    job = engine.edit(measured.served, "edict", measured.scale.steps, 1)
    done = engine.run(measured.served, measured.settings, [job], preview_every=1)
    return {"seconds": done.preview_s, "edit_s": done.total_s}


def _under_load(measured: Measured) -> dict[str, float]:
    capacity = measured.get("saturated", "edits_per_s")
    assert capacity is not None, "what the engine can do was not measured"
    per_s = 0.9 * median(capacity)
    count = max(4, round(per_s * measured.scale.load_s))
    jobs = engine.mix(measured.served, measured.scale.steps, count)
    done = engine.run(measured.served, measured.settings, jobs, engine.arrivals(count, per_s))
    p50, p95 = np.percentile(done.latency_s, (50, 95))
    return {
        "edits": float(count), "per_s": per_s, "p50_s": float(p50), "p95_s": float(p95),
        "rows_per_pass": done.rows_per_pass, "padding": done.padding,
    }  # fmt: skip


def _float64(measured: Measured) -> dict[str, float]:
    return {"seconds": bare.official_edict_s(measured.scale, measured.device)}


def _sdxl(measured: Measured) -> dict[str, Any]:
    recorder = CudaRecorder(measured.device) if measured.device.type == "cuda" else None
    gflop, rows_per_s = bare.sdxl(measured.scale, measured.device, recorder)
    return {"gflop": gflop, "rows_per_s": rows_per_s}


SECTIONS: Mapping[str, Callable[[Measured], Any]] = {
    "ceiling": _ceiling,
    "passes": _passes,
    "side stages": _side_stages,
    "saturated": _saturated,
    "solo": _solo,
    "round trip": _round_trip,
    "reuse": _reuse,
    "preview": _preview,
    "diffusers": _diffusers,
    "load": _under_load,
    "float64 EDICT": _float64,
    "SDXL": _sdxl,
}
"""The most important first."""


# --- the report -----------------------------------------------------------------------------------------------------


def _report(measured: Measured) -> Report:
    scale, budget = measured.scale, measured.budget
    tables = (_targets(measured), *_passes_table(measured), *_solo_table(measured), _sections_table(measured))
    findings = [f"{name}: {why}." for name, why in budget.missing.items()]
    info = measured.served.facts.info
    findings.append(
        "The network gives a row the same bits in passes of every size, so passes have any size."
        if info.batch_class is None
        else f"The bits of a row depend on the size of its pass, so all passes have {info.batch_class} rows."
    )
    findings.append(
        "Not measured here: diffusers under torch.compile, whose compilation alone takes minutes, and request-level "
        "batching, which the benchmark of peers has."
    )
    return Report(
        name="gpu",
        about=ABOUT.format(scale=scale.name, dtype=scale.dtype, steps=scale.steps, rounds=scale.rounds),
        tables=tables,
        findings=tuple(findings),
        figures={
            "scale": asdict(scale), "gflop_per_row": measured.gflop, "values": measured.values,
            "peak_gib": measured.peak_gib, "taken_s": budget.taken_s, "missing": budget.missing,
        },
    )  # fmt: skip


def _mfu(measured: Measured, rows_per_s: float, gflop: float) -> float:
    """Share of the ceiling, in percent."""
    ceiling = measured.get("ceiling", "tflop_per_s")
    return 100 * rows_per_s * gflop / 1e3 / ceiling if ceiling else float("nan")


def _targets(measured: Measured) -> Table:
    """What was aimed at, the least that was, and what was measured."""
    get = measured.get
    speed, edits = get("saturated", "rows_per_s"), get("diffusers", "our engine")
    bare_rows = get("passes", "our backend")
    lines: list[tuple[str, str, str]] = []

    def line(what: str, floor: str, value: object, text: Callable[[], str]) -> None:
        lines.append((what, floor, "not measured" if value is None else text()))

    line("rows/s saturated, of the ceiling", "560, 57 %", speed, lambda: (
        f"{spread(speed, 0)}, {_mfu(measured, median(speed), measured.gflop):.0f} %"
    ))  # fmt: skip
    for name, floor in (("one by one", "5x"), ("static batch", "1.5x")):
        theirs = get("diffusers", name)
        ratio = None if theirs is None else median(edits) / median(theirs)
        line(f"edits/s against diffusers, {name}", floor, ratio, partial("{:.1f}x".format, ratio))
    official, edict = get("float64 EDICT", "seconds"), get("solo", "edict", "seconds")
    both = None if official is None or edict is None else official
    line("EDICT against float64, one call a row: alone", "15x", both, lambda: f"{official / edict:.0f}x")
    planned = None if speed is None or official is None else get("solo", "edict", "rows")
    line("the same, saturated", "25x", planned, lambda: f"{official * median(speed) / planned:.0f}x")
    line("4 prompts on one photo against 4 photos: EDICT, DiffEdit", "1.55x, 1.33x", get("reuse"), lambda: ", ".join(
        f"{one['faster']:.2f}x" for one in get("reuse").values()
    ))  # fmt: skip
    alone_s = None if speed is None or bare_rows is None else _alone_s(get("saturated", "sizes"), bare_rows)
    line("time that the same passes do not take without the engine", "3 %", alone_s, lambda: (
        f"{100 * (1 - alone_s / get('saturated', 'total_s')):.1f} %"
    ))  # fmt: skip
    line("time outside passes: saturated", "3 %", speed, lambda: f"{100 * get('saturated', 'outside'):.1f} %")
    line("time outside passes: alone", "8 %", edict, lambda: f"{100 * get('solo', 'edict', 'outside'):.1f} %")
    line("rows a pass, padding at nine tenths of the load", "12, 3 %", get("load"), lambda: (
        f"{get('load', 'rows_per_pass'):.1f}, {100 * get('load', 'padding'):.1f} %"
    ))  # fmt: skip
    line("p50, p95 seconds at that load", "-", get("load"), lambda: (
        f"{get('load', 'p50_s'):.2f}, {get('load', 'p95_s'):.2f}"
    ))  # fmt: skip
    line("EDICT there and back: alone, among random jobs", "1e-10", get("round trip"), lambda: (
        f"{get('round trip', 'error_alone'):.1e}, {get('round trip', 'error_busy'):.1e}, "
        f"{'the same bits' if get('round trip', 'same_bits') else 'OTHER BITS'}"
    ))  # fmt: skip
    xl = get("SDXL", "rows_per_s")
    line("SDXL rows/s, of the ceiling", "60, 51 %", xl, lambda: (
        f"{max(xl.values()):.0f}, {_mfu(measured, max(xl.values()), get('SDXL', 'gflop')):.0f} %"
    ))  # fmt: skip
    line("seconds to the first preview of an EDICT edit, of the edit", "-", get("preview", "seconds"), lambda: (
        f"{get('preview', 'seconds'):.2f}, {get('preview', 'edit_s'):.2f}"
    ))  # fmt: skip
    line("ceiling: TFLOP/s, copy GB/s", "-", get("ceiling"), lambda: (
        f"{get('ceiling', 'tflop_per_s'):.1f}, {get('ceiling', 'gb_per_s'):.0f}"
    ))  # fmt: skip
    line("milliseconds to encode, decode an image, embed a text", "-", get("side stages"), lambda: ", ".join(
        f"{1e3 * value:.1f}" for value in get("side stages").values()
    ))  # fmt: skip
    return Table("Targets", ("what", "at least", "measured"), tuple(lines), (
        "The column 'at least' is for an H200.",
        "The time of float64 is extrapolated from a few steps to all of inversion and generation.",
        "diffusers edits by SDEdit, as our engine does in that comparison, and a static batch has one setting for all; "
        "its autoencoder is in the network's dtype, ours in float32 with TF32. Pictures are not compared: the weights "
        "are random.",
    ))  # fmt: skip


def _alone_s(sizes: list[int], rows_per_s: Mapping[int, list[float]]) -> float:
    """Seconds of passes of these sizes one after another, from the measured ones; between two, it is interpolated."""
    known = sorted(rows_per_s)
    return float(np.interp(sizes, known, [rows / median(rows_per_s[rows]) for rows in known]).sum())


def _passes_table(measured: Measured) -> tuple[Table, ...]:
    found = measured.get("passes")
    if found is None:
        return ()
    columns = ("rows/s of the network alone", *(f"{rows} rows" for rows in measured.scale.rows), "of the ceiling %")
    rows = [
        (
            name, *(spread(speeds[rows], 1) for rows in measured.scale.rows),
            f"{max(_mfu(measured, median(speed), measured.gflop) for speed in speeds.values()):.0f}",
        )
        for name, speeds in found.items()
    ]  # fmt: skip
    xl = measured.get("SDXL", "rows_per_s") or {}
    notes = (f"SDXL: {', '.join(f'{speed:.1f} at {rows} rows' for rows, speed in xl.items())}.",) if xl else ()
    return (Table("Passes of the network", columns, tuple(rows), notes),)


def _solo_table(measured: Measured) -> tuple[Table, ...]:
    found = measured.get("solo")
    if found is None:
        return ()
    ceiling = measured.get("ceiling", "tflop_per_s")
    rows = [
        (
            method, f"{one['rows']:.0f}", f"{one['seconds']:.3f}", f"{100 * one['outside']:.1f}",
            "-" if ceiling is None else f"{one['seconds'] / (one['rows'] * measured.gflop / 1e3 / ceiling):.1f}",
        )
        for method, one in found.items()
    ]  # fmt: skip
    columns = ("one edit, alone", "network rows", "seconds", "outside passes %", "times the least possible")
    return (Table("Alone", columns, tuple(rows), ("The least possible is the rows' operations at the ceiling.",)),)


def _sections_table(measured: Measured) -> Table:
    rows = [
        (name, f"{taken:.1f}", f"{measured.peak_gib.get(name, 0.0):.1f}", measured.budget.missing.get(name, "measured"))
        for name, taken in measured.budget.taken_s.items()
    ]
    skipped = measured.budget.missing.keys() - measured.budget.taken_s.keys()
    rows += [(name, "-", "-", measured.budget.missing[name]) for name in SECTIONS if name in skipped]
    return Table("Sections", ("section", "seconds", "peak GiB reserved", "outcome"), tuple(rows))
