"""What comes back after inverting a photo and running the way back, alone and on a busy server."""

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
from PIL import Image
from safetensors.numpy import load as read_safetensors
from underpaint import Client, Ddim, DdimInversion, DiffEdit, Edict, EdictInversion, SdEdit, UnderpaintError

from benchmarks import cases, served
from benchmarks.report import Report, Table, console
from underpaint_server.local import LocalServer

DTYPES = ("float32", "bfloat16")
STRENGTHS = (0.8, 0.7)
GUIDANCES = (1.0, 3.0, 7.0)
METHODS = {"EDICT": EdictInversion(), "DDIM": DdimInversion()}
BESIDE = 8
"""Other jobs on the busy server."""
ABOUT = (
    "Photos are inverted with their own prompt and brought back with the same prompt and guidance, {steps} steps, on a "
    "real server of the embedded model. Latent error is the largest absolute difference of any latent (worst photo); "
    "PSNR compares pixels with the photo (mean of {photos}). The floor is the autoencoder alone: no inversion can come "
    "back closer than that. The busy server runs {beside} other random jobs (any method, steps, strength, prompt) all "
    "the while, and the measured jobs of one strength beside each other. 'Same bits' says whether the inversion made "
    "on the busy server is, to the last bit, the one made alone."
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
    """One photo there and back."""

    max_abs_error: float
    psnr_db: float
    arrays: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """A cell's figures over all photos."""

    cell: Cell
    error_alone: float
    error_busy: float
    psnr_alone_db: float
    psnr_busy_db: float
    floor_db: float
    same_bits: bool


def run(quick: bool) -> Report:
    """See the module."""
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
    with LocalServer(dtype=dtype) as server, Client(server.target, timeout=1200) as client:
        floor = mean(_floor_db(client, case) for case in photos)
        trips: dict[Cell, tuple[list[Trip], list[Trip]]] = {}
        for method, strength in product(METHODS, STRENGTHS):
            cells = [Cell(dtype, method, strength, scale) for scale in GUIDANCES]
            calls = [partial(_trip, client, case, cell, steps) for cell in cells for case in photos]
            alone = [call() for call in calls]
            with _random_jobs(server.target, steps):
                busy = served.at_once(calls)
            for i, cell in enumerate(cells):
                mine = slice(i * len(photos), (i + 1) * len(photos))
                trips[cell] = alone[mine], busy[mine]
            console.print(f"{dtype} {method} strength {strength}: {max(t.max_abs_error for t in alone + busy):.1e}")
    for cell, (alone, busy) in trips.items():
        yield _line(cell, alone, busy, floor)


def _trip(client: Client, case: cases.Case, cell: Cell, steps: int) -> Trip:
    made = client.invert(
        case.photo, method=METHODS[cell.method], source_prompt=case.source_prompt, steps=steps,
        strength=cell.strength, guidance_scale=cell.guidance_scale, verify=True,
    )  # fmt: skip
    assert made.reconstruction_max_abs_error is not None
    assert made.reconstruction_psnr_db is not None
    arrays = read_safetensors(client.export_inversion(made))
    client.delete_inversion(made)  # the next time it has to be computed again
    return Trip(made.reconstruction_max_abs_error, made.reconstruction_psnr_db, arrays)


def _floor_db(client: Client, case: cases.Case) -> float:
    """The photo through the autoencoder: an edit that may change nothing."""
    nowhere = Image.new("L", (case.source.shape[1], case.source.shape[0]), 0)
    kept = client.edit(case.photo, case.target_prompt, DiffEdit(mask=nowhere, steps=1, strength=1.0))
    return cases.psnr_db(cases.pixels(kept.image), case.source)


def _line(cell: Cell, alone: list[Trip], busy: list[Trip], floor_db: float) -> Line:
    return Line(
        cell=cell,
        error_alone=max(trip.max_abs_error for trip in alone),
        error_busy=max(trip.max_abs_error for trip in busy),
        psnr_alone_db=mean(trip.psnr_db for trip in alone),
        psnr_busy_db=mean(trip.psnr_db for trip in busy),
        floor_db=floor_db,
        same_bits=all(
            np.array_equal(a.arrays[name], b.arrays[name])
            for a, b in zip(alone, busy, strict=True)
            for name in a.arrays
        ),
    )


# --- the other jobs ---------------------------------------------------------------------------------------------


@contextmanager
def _random_jobs(target: str, steps: int) -> Iterator[None]:
    """So many callers ask for one random edit after another until the block is left."""
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
            if not over.is_set():  # leaving the block ends the calls that run
                raise


# --- tables -----------------------------------------------------------------------------------------------------


def _table(dtype: str, lines: list[Line]) -> Table:
    columns = (
        "method", "strength", "guidance", "latent error alone", "latent error busy", "PSNR alone dB", "PSNR busy dB",
        "floor dB", "same bits",
    )  # fmt: skip
    rows = tuple(
        (
            line.cell.method, f"{line.cell.strength}", f"{line.cell.guidance_scale:g}", f"{line.error_alone:.1e}",
            f"{line.error_busy:.1e}", f"{line.psnr_alone_db:.2f}", f"{line.psnr_busy_db:.2f}", f"{line.floor_db:.2f}",
            "yes" if line.same_bits else "no",
        )
        for line in lines
    )  # fmt: skip
    return Table(f"There and back, {dtype} network", columns, rows)


def _findings(lines: list[Line]) -> Iterator[str]:
    for dtype, method in product(DTYPES, METHODS):
        mine = [line for line in lines if (line.cell.dtype, line.cell.method) == (dtype, method)]
        error = [max(line.error_alone, line.error_busy) for line in mine]
        below = [line.floor_db - min(line.psnr_alone_db, line.psnr_busy_db) for line in mine]
        same = sum(line.same_bits for line in mine)
        yield (
            f"{method} on {dtype}: latent error {min(error):.1e} to {max(error):.1e}, pixels {min(below):.2f} to "
            f"{max(below):.2f} dB below the autoencoder's floor; {same} of {len(mine)} settings give the same bits "
            f"on the busy server."
        )
