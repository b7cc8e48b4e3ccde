"""Throughput of eight mixed requests sent at the same time, against the same eight one after another."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import mean, median

from underpaint import Client, Ddim, DiffEdit, Edict, Edited, SdEdit
from underpaint_server.local_server import LocalServer

from benchmarks import cases, served
from benchmarks.report import Report, Table, console, spread

METHODS = (Edict, Ddim, DiffEdit, SdEdit)
DTYPES = ("float32", "bfloat16")
WARM_UP_STEPS = 5
ABOUT = (
    "Eight requests (two each of EDICT, DDIM, DiffEdit and SDEdit at their default settings, {steps} steps; eight "
    "photos, prompts and seeds) sent to a real server of the embedded model: one after another, and all at once. The "
    "two ways alternate (A B A B ...) after a short unmeasured round of each; the pictures of every two neighbouring "
    "rounds are compared byte for byte, and unequal ones end the benchmark. Stored inversions are deleted before "
    "every round, and the server reuses no rows, so every round computes everything. Figures are medians over the "
    "rounds, with smallest and largest; ratios are taken between neighbouring rounds. The mean wait counts from the "
    "start of the round: all eight callers are there from the beginning."
)
_Timed = tuple[Edited, float, float]


@dataclass(frozen=True, slots=True)
class Round:
    """The eight requests, sent once in one of the two ways."""

    seconds: float
    began_s: tuple[float, ...]
    """When each request was sent, in seconds from the start of the round."""
    answered_s: tuple[float, ...]
    """When its response arrived, in seconds from the start of the round."""
    counters: served.Counters
    pictures: tuple[bytes, ...]

    @property
    def each_s(self) -> tuple[float, ...]:
        """Seconds from sending each request to its response."""
        return tuple(end - begin for begin, end in zip(self.began_s, self.answered_s, strict=True))


@dataclass(frozen=True, slots=True)
class Outcome:
    """All rounds with one dtype."""

    dtype: str
    alone: list[Round]
    together: list[Round]

    @property
    def ratios(self) -> list[float]:
        """Speed-up of sending at the same time, for each pair of neighbouring rounds."""
        return [a.seconds / b.seconds for a, b in zip(self.alone, self.together, strict=True)]


def run(quick: bool) -> Report:
    """Run the benchmark; see the module."""
    steps, rounds = (20, 2) if quick else (50, 3)
    outcomes = [_measure(dtype, steps, rounds) for dtype in DTYPES]
    return Report(
        name="throughput",
        about=ABOUT.format(steps=steps),
        tables=(_speed(outcomes), *(_methods(outcome) for outcome in outcomes)),
        findings=tuple(_finding(outcome) for outcome in outcomes),
        figures={outcome.dtype: _figures(outcome) for outcome in outcomes},
    )


def _measure(dtype: str, steps: int, rounds: int) -> Outcome:
    with (
        LocalServer(dtype=dtype, spare_engine=False, reuse_bytes=0) as server,
        Client(server.target, timeout=600) as client,
    ):
        for send_all in (_alone, _together):
            send_all(server, client, _requests(client, WARM_UP_STEPS))
        requests = _requests(client, steps)
        outcome = Outcome(dtype, [], [])
        for number in range(rounds):
            outcome.alone.append(_alone(server, client, requests))
            outcome.together.append(_together(server, client, requests))
            _refuse_unequal(outcome.alone[-1], outcome.together[-1])
            console.print(f"{dtype}, round {number + 1} of {rounds}: {outcome.ratios[-1]:.2f} times")
        return outcome


def _requests(client: Client, steps: int) -> list[Callable[[], Edited]]:
    return [
        partial(client.edit, case.photo, case.target_prompt, method(steps=steps), seed=seed,
                source_prompt="" if method is SdEdit else case.source_prompt)
        for seed, (case, method) in enumerate(zip(cases.load()[::4], METHODS * 2, strict=True))
    ]  # fmt: skip


def _alone(server: LocalServer, client: Client, requests: list[Callable[[], Edited]]) -> Round:
    return _round(server, client, requests, lambda calls: [call() for call in calls])


def _together(server: LocalServer, client: Client, requests: list[Callable[[], Edited]]) -> Round:
    return _round(server, client, requests, served.at_once)


def _round(
    server: LocalServer,
    client: Client,
    requests: list[Callable[[], Edited]],
    send: Callable[[list[Callable[[], _Timed]]], list[_Timed]],
) -> Round:
    served.forget(client)
    before, start = served.Counters.read(server), time.perf_counter()
    answers = send([partial(_timed, request, start) for request in requests])
    seconds = time.perf_counter() - start
    counters = served.Counters.read(server) - before
    edited, began_s, answered_s = zip(*answers, strict=True)
    return Round(seconds, began_s, answered_s, counters, tuple(answer.image_bytes for answer in edited))


def _timed(request: Callable[[], Edited], start: float) -> _Timed:
    began = time.perf_counter() - start
    return request(), began, time.perf_counter() - start


def _refuse_unequal(alone: Round, together: Round) -> None:
    """Exit with an error if the two rounds did different work, because their times could then not be compared."""
    unequal = [i for i, (a, b) in enumerate(zip(alone.pictures, together.pictures, strict=True)) if a != b]
    if unequal or alone.counters.rows != together.counters.rows:
        raise SystemExit(f"requests {unequal} gave other bytes at once than alone; the times cannot be compared")


# --- tables -----------------------------------------------------------------------------------------------------


def _speed(outcomes: list[Outcome]) -> Table:
    columns = ("network", "sent", "seconds", "edits/s", "network rows/s", "rows per pass", "padding", "mean wait s")
    rows = [row for outcome in outcomes for row in (
        _row(outcome.dtype, "one by one", outcome.alone),
        _row(outcome.dtype, "at once", outcome.together),
        (outcome.dtype, "ratio", spread(outcome.ratios), "", "", "", "", ""),
    )]  # fmt: skip
    return Table("Eight requests", columns, tuple(rows))


def _row(dtype: str, sent: str, rounds: list[Round]) -> tuple[str, ...]:
    seconds, first = median(r.seconds for r in rounds), rounds[0].counters
    return (
        dtype, sent, spread([r.seconds for r in rounds]), f"{len(rounds[0].each_s) / seconds:.2f}",
        f"{first.rows / seconds:.0f}", f"{median(r.counters.rows_per_pass for r in rounds):.2f}",
        f"{100 * median(r.counters.padding_share for r in rounds):.1f} %",
        f"{median(mean(r.answered_s) for r in rounds):.2f}",
    )  # fmt: skip


def _methods(outcome: Outcome) -> Table:
    rows = []
    for number, method in enumerate(METHODS):
        mine = [r.each_s[i] for r in outcome.alone for i in range(number, len(r.each_s), len(METHODS))]
        beside = [r.each_s[i] for r in outcome.together for i in range(number, len(r.each_s), len(METHODS))]
        rows.append((method.__name__, spread(mine), spread(beside)))
    caption = f"Seconds of one request, {outcome.dtype}"
    return Table(caption, ("method", "alone", "beside the seven others"), tuple(rows))


def _finding(outcome: Outcome) -> str:
    together = outcome.together[0].counters
    return (
        f"{outcome.dtype}: at once is {median(outcome.ratios):.2f} times as fast as one by one, with equal bytes; "
        f"{together.rows_per_pass:.1f} rows share a pass instead of {outcome.alone[0].counters.rows_per_pass:.1f}."
    )


def _figures(outcome: Outcome) -> dict[str, object]:
    return {"ratios": outcome.ratios, "one_by_one": _plain(outcome.alone), "at_once": _plain(outcome.together)}


def _plain(rounds: list[Round]) -> list[dict[str, object]]:
    return [
        {"seconds": r.seconds, "began_s": r.began_s, "answered_s": r.answered_s, **asdict(r.counters)} for r in rounds
    ]
