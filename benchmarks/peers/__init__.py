"""Our server against what its users would run otherwise: diffusers, EDICT's own arithmetic, request-level batching."""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image
from underpaint import Client
from underpaint_server.local_server import LocalServer

from benchmarks.peers import charts, eight, load, passes, targets, while_learning
from benchmarks.peers.batchers import FRAMEWORKS, Batcher, Unavailable, environment
from benchmarks.peers.edits import Edit, Pixels
from benchmarks.peers.eight import ALONE, AT_THE_SAME_TIME, BATCH, ONE_EDICT, OURS, Contender, Outcome
from benchmarks.peers.load import Sweep
from benchmarks.peers.lockstep import Lockstep
from benchmarks.peers.loops import Loops
from benchmarks.peers.networks import OpenVino, best_precision, eager
from benchmarks.peers.official import OfficialEdict
from benchmarks.peers.openloop import GOOD, MIX
from benchmarks.peers.passes import Measured
from benchmarks.peers.setup import AT_ONCE, BATCH_TIMEOUT_S, FULL, QUICK, SERVER, Scale, backend
from benchmarks.peers.targets import BFLOAT16, FLOAT32, OFFICIAL, OPENVINO, TORCH
from benchmarks.report import Report, console, spread

ABOUT = (
    "A real server of the embedded model in processes of its own, beside what its users would run otherwise, in one "
    "run on one machine. **diffusers**: loops of the same edits around its U-Net, schedulers and autoencoder, one edit "
    "after another and in static batches (edits of one batch share method and schedule), the U-Net eager in float32 "
    "and bfloat16, and exported to ONNX and compiled by OpenVINO ({precision}), one static shape for each batch size, "
    "with one stream or with two that take half of the rows each, whichever is faster. **EDICT in float64**: all "
    "networks and latents float64, every prediction a call of its own, as its authors compute it. **LitServe and "
    "mosec**: request-level batching (at most {at_once} requests, {timeout} ms) of the same network as our server's, "
    "through the same programs, and the rows of all requests of a batch share passes whatever their method: only the "
    "scheduling differs.\n\n"
    "Contenders take turns (A B A B ...); figures are medians, with smallest and largest; ratios are taken within a "
    "round. Before anything is timed, and again after, every picture is compared with our own result in float32: "
    "{float32:.0f} dB are required of a float32 network, {half:.0f} dB of one in half precision ({check:.0f} dB in the "
    "check, of {check_steps} steps), and equal bytes of our server alone and at once; else the benchmark ends with an "
    "error. Schedule: {steps} steps, strength 0.8. Stored inversions are deleted before every round.\n\n"
    "The open loop sends requests at times drawn before ({mix}; {trace_steps} steps, strength 0.5, 0.75 or 1, photos, "
    "prompts and seeds all different), {point_s:.0f} s at each load, whatever the answers take."
)


def run(quick: bool) -> Report:
    """Run the benchmark; see the package."""
    scale = QUICK if quick else FULL
    skipped: list[str] = []
    ours = backend()
    shapes = passes.row_shapes(ours)
    try:
        openvino: OpenVino | None = OpenVino(best_precision(), shapes)
    except ImportError as error:
        openvino = None
        skipped.append(f"OpenVINO is not installed ({error}): its U-Net in diffusers' loops was not measured")
    if openvino is not None:
        console.print("compiling the OpenVINO U-Net")
        openvino.prepare()
    alone = passes.measure(scale, ours, openvino)
    reference = Lockstep(backend("torch:", dtype="float32"), AT_ONCE * 2)
    settings: dict[str, Any] = {"spare_engine": False, **SERVER}
    precision = "float32" if ours.facts.info.dtype == "float32" else "half"
    del ours
    with LocalServer(**settings) as server:
        with Client(server.target, timeout=600) as client:
            contenders = [*_diffusers(openvino), _on_torch(reference), *eight.of_server(client, precision)]
            outcomes = eight.measure(scale, contenders, reference, client)
        with ExitStack() as stack:
            batchers = _batchers(stack, skipped)
            sweep = asyncio.run(load.sweep(scale, server, batchers))
        learning = asyncio.run(while_learning.measure(scale, server, sweep.rows_per_s[load.OURS]))
    return Report(
        name="peers",
        about=_about(scale, openvino),
        tables=(
            targets.table(outcomes, sweep, alone, learning.gain),
            alone.table(),
            *eight.tables(outcomes),
            load.table(sweep),
            while_learning.table(learning),
        ),
        findings=(
            *skipped,
            *_closed_findings(outcomes, openvino),
            *_open_findings(sweep, alone),
            f"Short edits while a direction is learned: their 95th percentile is {learning.gain:.1f} times smaller "
            "than with first come, first served.",
        ),
        figures={
            "passes": {"rates": alone.rates, "ceilings": alone.ceilings},
            "streams": openvino.chosen if openvino is not None else {},
            "eight": {name: asdict(outcome) for name, outcome in outcomes.items()},
            "open_loop": load.plain(sweep),
            "learning": while_learning.plain(learning),
            "server": {key: str(value) for key, value in SERVER.items()},
        },
        picture=_picture(alone, outcomes, sweep),
        legend=(
            "Rows per second of each network alone; seconds of eight edits; 95th percentile of the latency and share "
            "of requests answered in time in the open loop, by load"
        ),
    )


def _diffusers(openvino: OpenVino | None) -> list[Contender]:
    found = [
        *eight.of_loops(FLOAT32, "float32", Loops(eager(torch.float32)), slow=True),
        *eight.of_loops(BFLOAT16, "half", Loops(eager(torch.bfloat16)), slow=True),
        Contender(OFFICIAL, "", "float32", OfficialEdict().run, slow=True, only=ONE_EDICT),
    ]
    if openvino is not None:
        precision = "half" if openvino.precision == "bf16" else "float32"
        found += eight.of_loops(OPENVINO, precision, Loops(openvino), slow=False)
    return found


def _on_torch(reference: Lockstep) -> Contender:
    """Our own methods without a server, on torch: the time of a single edit before there were other backends."""

    def run(edits: Sequence[Edit]) -> list[Pixels]:
        return [result.pixels for result in reference.run([edit.job() for edit in edits])]

    return Contender(TORCH, "", "float32", run, slow=True, only=ONE_EDICT)


def _batchers(stack: ExitStack, skipped: list[str]) -> list[Batcher]:
    """The other frameworks' servers, started; what cannot run is named in ``skipped``."""
    try:
        python = environment()
    except Unavailable as error:
        skipped.append(f"{error}: request-level batching was not measured")
        console.print(f"skipped: {error}")
        return []
    started = []
    for framework in FRAMEWORKS:
        console.print(f"starting {framework.name}")
        try:
            started.append(stack.enter_context(Batcher(framework, python)))
        except Unavailable as error:
            skipped.append(f"{framework.name} was not measured: {str(error).splitlines()[0]}")
            console.print(f"skipped: {error}")
    return started


def _about(scale: Scale, openvino: OpenVino | None) -> str:
    names = {"ddim": "DDIM", "edict": "EDICT", "diffedit": "DiffEdit", "content_injection": "content injection"}
    precision = {"bf16": "bfloat16", "f32": "float32, because this CPU has no bfloat16"}
    return ABOUT.format(
        precision=precision[openvino.precision] if openvino is not None else "not installed here",
        at_once=AT_ONCE,
        timeout=round(1000 * BATCH_TIMEOUT_S),
        float32=eight.FLOOR_DB["float32"],
        half=eight.FLOOR_DB["half"],
        check=eight.CHECK_FLOOR_DB["half"],
        check_steps=scale.check_steps,
        steps=scale.steps,
        mix=", ".join(f"{100 * share:.0f} % {names[method]}" for method, share in MIX.items()),
        trace_steps=" or ".join(map(str, scale.trace_steps)),
        point_s=scale.point_s,
    )


# --- findings ---------------------------------------------------------------------------------------------------


def _closed_findings(outcomes: dict[str, Outcome], openvino: OpenVino | None) -> list[str]:
    at_once = f"{OURS}, {AT_THE_SAME_TIME}"
    several = {name: outcome for name, outcome in outcomes.items() if name != ONE_EDICT}
    found = []
    if openvino is not None:
        found.append(
            "Our server, eight edits at once, over diffusers with an OpenVINO U-Net in static batches: "
            + _each(several, at_once, f"{OPENVINO}, {BATCH}")
        )
        found.append(
            "Over the same one by one: " + _each(several, at_once, f"{OPENVINO}, {ALONE}")
        )  # fmt: skip
    found.append(
        "Our server, eight edits at once, over diffusers in float32 one by one: "
        + _each(several, at_once, f"{FLOAT32}, {ALONE}")
    )
    single = outcomes[ONE_EDICT]
    others = [label for label in single.seconds if label != f"{OURS}, {ALONE}"]
    found.append(
        f"A single EDICT takes our server {spread(single.seconds[f'{OURS}, {ALONE}'])} s: "
        + "; ".join(f"{spread(single.ratio(f'{OURS}, {ALONE}', label))} of {label}" for label in others)
        + "."
    )
    return found


def _each(outcomes: dict[str, Outcome], label: str, other: str) -> str:
    return "; ".join(f"{name} {spread(outcome.ratio(label, other))}" for name, outcome in outcomes.items()) + "."


def _open_findings(sweep: Sweep, alone: Measured) -> list[str]:
    rates = sweep.rows_per_s
    best = max(alone.best(name) for name in alone.rates if name.startswith(passes.OURS))
    injected = 100 * MIX["content_injection"]
    found = [
        f"Our server saturated: {rates[load.OURS]:.0f} network rows/s with {injected:.0f} % content injections among "
        f"the requests, {100 * rates[load.OURS] / best:.0f} % of what its network alone does in its best pass "
        f"({best:.0f})."
    ]
    for name in rates:
        if name == load.OURS:
            continue
        factors = sorted({point.factor for point in sweep.points})
        tails = "; ".join(
            f"{sweep.point(name, f).summary.p95_s / sweep.point(load.OURS, f).summary.p95_s:.2f} at load {f}"
            for f in factors
        )
        found.append(
            f"The 95th percentile of {name}'s latency over our server's, with the same network and trace: {tails}. "
            f"Its saturated rows/s are {rates[name] / rates[load.OURS]:.2f} of ours."
        )
    shares = "; ".join(
        f"{name} " + ", ".join(f"{100 * point.summary.in_time:.0f} %" for point in sweep.points if point.system == name)
        for name in rates
    )
    found.append(f"Answered within {GOOD:g} times the latency alone, at rising load: {shares}.")
    return found


# --- picture ----------------------------------------------------------------------------------------------------


def _picture(alone: Measured, outcomes: dict[str, Outcome], sweep: Sweep) -> Image.Image:
    systems = list(sweep.rows_per_s)
    tails = {name: [(p.factor, p.summary.p95_s) for p in sweep.points if p.system == name] for name in systems}
    shares = {name: [(p.factor, 100 * p.summary.in_time) for p in sweep.points if p.system == name] for name in systems}
    rates = {name: [(float(size), alone.rate(name, size)) for size in by_size] for name, by_size in alone.rates.items()}
    shown = [f"{FLOAT32}, {ALONE}", f"{FLOAT32}, {BATCH}", f"{OPENVINO}, {ALONE}", f"{OPENVINO}, {BATCH}",
             f"{OURS}, {AT_THE_SAME_TIME}"]  # fmt: skip
    seconds = {
        name: {label: eight.seconds(outcome, label) for label in shown if label in outcome.seconds}
        for name, outcome in outcomes.items()
        if name != ONE_EDICT
    }
    return charts.sheet([
        charts.lines("Network alone: rows/s", "rows of a pass", rates),
        charts.bars("Eight edits: seconds", seconds, logarithmic=True),
        charts.lines("Open loop: 95th percentile of the latency, s", "load", tails, logarithmic=True),
        charts.lines("Open loop: answered in time, %", "load", shares),
    ])  # fmt: skip
