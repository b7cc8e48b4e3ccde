"""Several prompts on one photo at the same time, on a server that computes equal rows once and on one that does not."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import psutil
from underpaint import Client, Ddim, DiffEdit, Edict
from underpaint_server.local_server import LocalServer

from benchmarks import cases, served
from benchmarks.report import Report, Table, console, spread

METHODS = (Edict, Ddim, DiffEdit)
LOADS = ((1, 1), (1, 4), (4, 4))
"""(photos, prompts on each)."""
ABOUT = (
    "Edits of one photo with one prompt, of one with four and of four with four each, sent at once to two real servers "
    "of the embedded model (float32, {steps} steps, default settings, one seed): one that computes equal rows once, "
    "and one with --reuse-bytes 0, which computes every row. The two alternate (A B A B ...) after an unmeasured round "
    "of each; the pictures of the two are compared byte for byte, and unequal ones end the benchmark. Every round has "
    "photos of its own, so nothing is known of them beforehand. Seconds are from the first request to the last answer, "
    "CPU seconds those of the server's processes; figures are medians over the rounds, with smallest and largest, and "
    "ratios are taken between neighbouring rounds. The bound is the ratio of the rows that were computed. It is "
    "reached where rows cost the same in every pass: the shared inversion of a lone photo leaves passes small, and a "
    "network that computes small passes at a lower rate takes part of the gain."
)


@dataclass(frozen=True, slots=True)
class Round:
    """Edits sent at once."""

    method: str
    photos: int
    prompts: int
    seconds: float
    cpu_s: float
    """CPU seconds of the server's processes."""
    rows: float
    """Network rows that were computed."""
    passes: float
    pictures: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """The same edits on both servers."""

    separate: Round
    shared: Round

    @property
    def ratio(self) -> float:
        """How many times faster the edits are with shared rows."""
        return self.separate.seconds / self.shared.seconds

    @property
    def cpu_ratio(self) -> float:
        """How many times less CPU time the edits take with shared rows."""
        return self.separate.cpu_s / self.shared.cpu_s

    @property
    def bound(self) -> float:
        """How many times more rows were computed without sharing."""
        return self.separate.rows / self.shared.rows


def run(quick: bool) -> Report:
    """Run the benchmark; see the module."""
    steps, rounds = (10, 1) if quick else (20, 3)
    pairs: list[Pair] = []
    with (
        LocalServer(spare_engine=False, reuse_bytes=0) as separate,
        LocalServer(spare_engine=False) as shared,
        Client(separate.target, timeout=1200) as separate_client,
        Client(shared.target, timeout=1200) as shared_client,
    ):
        known = cases.load()
        for number in range(rounds + 1):
            for method in METHODS:
                for photos, prompts in LOADS[: 2 if number == 0 else None]:
                    mine, known = known[:photos], [*known[photos:], *known[:photos]]
                    send = partial(_round, mine, method, prompts, 5 if number == 0 else steps, number)
                    pair = Pair(send(separate, separate_client), send(shared, shared_client))
                    if pair.separate.pictures != pair.shared.pictures:
                        raise SystemExit(f"{method.__name__}: other bytes with shared rows; the times say nothing")
                    if number > 0:  # the first round is warm-up
                        pairs.append(pair)
                        console.print(f"{method.__name__}, {photos} x {prompts}: {pair.ratio:.2f} of {pair.bound:.2f}")
    return Report(
        name="reuse",
        about=ABOUT.format(steps=steps),
        tables=(_table(pairs),),
        findings=tuple(_finding(pairs, method.__name__) for method in METHODS),
        figures={"pairs": [{"separate": _plain(pair.separate), "shared": _plain(pair.shared)} for pair in pairs]},
    )


def _round(
    photos: Sequence[cases.Case],
    method: type[Edict] | type[Ddim] | type[DiffEdit],
    prompts: int,
    steps: int,
    seed: int,
    server: LocalServer,
    client: Client,
) -> Round:
    calls = [
        partial(client.edit, case.photo, target, method(steps=steps), seed=seed, source_prompt=case.source_prompt)
        for case in photos
        for target in (case.target_prompt, "a green leaf", "a blue ball", "a yellow star")[:prompts]
    ]
    served.forget(client)
    before, cpu_s, start = served.Counters.read(server), _cpu_s(server), time.perf_counter()
    edited = served.at_once(calls)
    seconds, cpu_s = time.perf_counter() - start, _cpu_s(server) - cpu_s
    counters = served.Counters.read(server) - before
    pictures = tuple(one.image_bytes for one in edited)
    return Round(method.__name__, len(photos), prompts, seconds, cpu_s, counters.rows, counters.passes, pictures)


def _cpu_s(server: LocalServer) -> float:
    process = psutil.Process(server.pid)
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children()))


def _of(pairs: list[Pair], method: str, load: tuple[int, int]) -> list[Pair]:
    return [pair for pair in pairs if (pair.shared.method, pair.shared.photos, pair.shared.prompts) == (method, *load)]


def _table(pairs: list[Pair]) -> Table:
    columns = (
        "method", "photos", "prompts", "s, every row", "s, equal rows once", "ratio", "ratio of CPU s", "bound", "rows",
        "equal once", "rows per pass", "equal once",
    )  # fmt: skip
    rows = []
    for method in METHODS:
        for load in LOADS:
            mine = _of(pairs, method.__name__, load)
            ways = [[pair.separate for pair in mine], [pair.shared for pair in mine]]
            rows.append((
                method.__name__, *map(str, load), *(spread([one.seconds for one in way]) for way in ways),
                spread([pair.ratio for pair in mine]), spread([pair.cpu_ratio for pair in mine]),
                f"{median(pair.bound for pair in mine):.2f}",
                *(f"{median(one.rows for one in way):.0f}" for way in ways),
                *(f"{median(one.rows / one.passes for one in way):.1f}" for way in ways),
            ))  # fmt: skip
    return Table("Prompts on photos, at once", columns, tuple(rows))


def _finding(pairs: list[Pair], method: str) -> str:
    one, four, busy = (_of(pairs, method, load) for load in LOADS)
    return (
        f"{method}: four prompts on one photo are {_gain(four)} with shared rows, on four photos {_gain(busy)}; "
        f"the bound is {median(pair.bound for pair in four):.2f}. One prompt: {_gain(one)}. Equal bytes."
    )


def _gain(pairs: list[Pair]) -> str:
    time, cpu = median(pair.ratio for pair in pairs), median(pair.cpu_ratio for pair in pairs)
    return f"{time:.2f} times as fast ({cpu:.2f} times by CPU time)"


def _plain(one: Round) -> dict[str, object]:
    return {name: value for name, value in asdict(one).items() if name != "pictures"}
