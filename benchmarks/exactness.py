"""Errors of inversion round trips, by method, dtype, strength and guidance scale, alone and on a busy server."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from random import Random
from statistics import mean
from typing import Any

import numpy as np
from safetensors.numpy import load as read_safetensors
from underpaint import Client, Ddim, DdimInversion, DiffEdit, Edict, EdictInversion, SdEdit, UnderpaintError
from underpaint.methods import InversionMethod
from underpaint_server.local_server import LocalServer

from benchmarks import cases, served
from benchmarks.report import Report, Table, console

DTYPES = ("float32", "bfloat16")
STRENGTHS = (0.8, 0.7)
GUIDANCES = (1.0, 3.0, 7.0)
METHODS: dict[str, InversionMethod] = {"EDICT": EdictInversion(), "DDIM": DdimInversion()}
BESIDE = 8
"""Callers that keep the busy server busy."""
ABOUT = (
    "Photos are inverted with their own prompt and brought back with the same prompt and guidance, {steps} steps, on "
    "a real server of the embedded model. Latent error is the largest absolute difference of any latent (worst "
    "photo); PSNR compares pixels with the photo (mean of {photos}). The floor is the autoencoder alone: no inversion"
    " can come back closer than that. The busy server runs {beside} other random jobs (any method, steps, strength, "
    "prompt) all the while, and all measured jobs beside each other. 'Same bits' says whether the inversion made on "
    "the busy server is, to the last bit, the one made alone."
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting."""

    dtype: str
    method: str
    strength: float
    guidance_scale: float


@dataclass(frozen=True, slots=True)
class Trip:
    """One photo inverted and reconstructed."""

    max_abs_error: float
    psnr_db: float
    jobs_per_pass: float
    """Mean number of jobs in its passes, itself included."""
    arrays: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """The figures of one setting over all photos."""

    cell: Cell
    error_alone: float
    error_busy: float
    psnr_alone_db: float
    psnr_busy_db: float
    floor_db: float
    jobs_per_pass_busy: float
    same_bits: bool


def run(quick: bool) -> Report:
    """Run the benchmark; see the module."""
    photos = cases.load(1)[: 1 if quick else 2]
    steps = 20 if quick else 50
    lines = [line for dtype in DTYPES for line in _measure(dtype, photos, steps)]
    return Report(
        name="exactness",
        about=ABOUT.format(steps=steps, photos=len(photos), beside=BESIDE),
        tables=tuple(_table(dtype, [line for line in lines if line.cell.dtype == dtype]) for dtype in DTYPES),
        findings=tuple(_findings(lines)),
        figures={"lines": [asdict(line) for line in lines]},
    )


def _measure(dtype: str, photos: list[cases.Case], steps: int) -> Iterator[Line]:
    with LocalServer(dtype=dtype, reuse_bytes=0) as server, Client(server.target, timeout=1200) as client:
        floor = mean(cases.psnr_db(served.through_autoencoder(client, case), case.source) for case in photos)
        cells = [Cell(dtype, *setting) for setting in product(METHODS, STRENGTHS, GUIDANCES)]
        calls = [partial(_trip, client, case, cell, steps) for cell in cells for case in photos]
        alone = [call() for call in calls]
        console.print(f"{dtype}: {len(alone)} round trips made alone")
        with _random_jobs(server.target, steps):
            busy = served.at_once(calls)
        console.print(f"{dtype}: the same made on a busy server")
    for i, cell in enumerate(cells):
        mine = slice(i * len(photos), (i + 1) * len(photos))
        yield _line(cell, alone[mine], busy[mine], floor)


def _trip(client: Client, case: cases.Case, cell: Cell, steps: int) -> Trip:
    made = client.invert(
        case.photo, method=METHODS[cell.method], source_prompt=case.source_prompt, steps=steps,
        strength=cell.strength, guidance_scale=cell.guidance_scale, verify=True,
    )  # fmt: skip
    assert made.reconstruction_max_abs_error is not None
    assert made.reconstruction_psnr_db is not None
    assert made.usage is not None
    assert not made.usage.inversion_cache_hit
    arrays = read_safetensors(client.export_inversion(made))
    client.delete_inversion(made)  # so that the busy run computes it again
    return Trip(made.reconstruction_max_abs_error, made.reconstruction_psnr_db, made.usage.mean_batch_size, arrays)


def _line(cell: Cell, alone: list[Trip], busy: list[Trip], floor_db: float) -> Line:
    return Line(
        cell=cell,
        error_alone=max(trip.max_abs_error for trip in alone),
        error_busy=max(trip.max_abs_error for trip in busy),
        psnr_alone_db=mean(trip.psnr_db for trip in alone),
        psnr_busy_db=mean(trip.psnr_db for trip in busy),
        floor_db=floor_db,
        jobs_per_pass_busy=mean(trip.jobs_per_pass for trip in busy),
        same_bits=all(
            np.array_equal(a.arrays[name], b.arrays[name])
            for a, b in zip(alone, busy, strict=True)
            for name in a.arrays
        ),
    )


# --- the other jobs ---------------------------------------------------------------------------------------------


@contextmanager
def _random_jobs(target: str, steps: int) -> Iterator[None]:
    """Have :data:`BESIDE` callers request random edits, each one after another, until the block is left."""
    over = threading.Event()
    with Client(target, timeout=1200) as client:
        callers = [threading.Thread(target=_ask, args=(client, number, steps, over)) for number in range(BESIDE)]
        for caller in callers:
            caller.start()
        yield
        over.set()
    for caller in callers:
        caller.join()


def _ask(client: Client, number: int, steps: int, over: threading.Event) -> None:
    random, photos = Random(number), cases.load()
    while not over.is_set():
        case, other = random.sample(photos, 2)
        settings: dict[str, Any] = {"steps": random.randint(steps // 2, steps), "strength": random.uniform(0.4, 1.0)}
        method = random.choice([Edict, Ddim, DiffEdit, SdEdit])(**settings)
        try:
            client.edit(case.photo, other.target_prompt, method, guidance_scale=random.uniform(1.0, 7.0))
        except UnderpaintError:
            if not over.is_set():  # leaving the block closes the client, which ends calls that run
                raise


# --- tables -----------------------------------------------------------------------------------------------------


def _table(dtype: str, lines: list[Line]) -> Table:
    columns = (
        "method", "strength", "guidance", "latent error alone", "latent error busy", "PSNR alone dB", "PSNR busy dB",
        "floor dB", "jobs per pass busy", "same bits",
    )  # fmt: skip
    rows = tuple(
        (
            line.cell.method, f"{line.cell.strength}", f"{line.cell.guidance_scale:g}", f"{line.error_alone:.1e}",
            f"{line.error_busy:.1e}", f"{line.psnr_alone_db:.2f}", f"{line.psnr_busy_db:.2f}", f"{line.floor_db:.2f}",
            f"{line.jobs_per_pass_busy:.1f}", "yes" if line.same_bits else "no",
        )
        for line in lines
    )  # fmt: skip
    return Table(f"There and back, {dtype} network", columns, rows)


def _findings(lines: list[Line]) -> Iterator[str]:
    for dtype, method in product(DTYPES, METHODS):
        mine = [line for line in lines if (line.cell.dtype, line.cell.method) == (dtype, method)]
        error = [max(line.error_alone, line.error_busy) for line in mine]
        below = [line.floor_db - min(line.psnr_alone_db, line.psnr_busy_db) for line in mine]
        pixels = (
            "as close as the autoencoder alone"
            if max(below) < 0.005
            else f"{min(below):.2f} to {max(below):.2f} dB below the autoencoder alone"
        )
        same = sum(line.same_bits for line in mine)
        yield (
            f"{method} on {dtype}: latent error {min(error):.1e} to {max(error):.1e}, pixels {pixels}; {same} of "
            f"{len(mine)} settings give the same bits on the busy server."
        )
