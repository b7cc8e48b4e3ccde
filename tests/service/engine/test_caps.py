"""How large passes may be: learned from how long they take and what does not fit."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from support.engine import Bench
from support.jobs import edit_job
from underpaint_server.backends.toy import SCALE, SHAPE, ToyBackend
from underpaint_server.engine.caps import FIRST_WAIT, MOST, TRIES, Caps
from underpaint_server.engine.messages import Capped, Split
from underpaint_server.jobs import Job
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.rows import Denoise, Key
from underpaint_server.settings import Settings

KEY = Key("m", Denoise, (4, 8, 8), None)
TRIAL = FIRST_WAIT + 2 * TRIES
"""Full passes until the first trial has ended."""
PX = SHAPE[1] * SCALE


def busy(caps: Caps, pass_s: Callable[[int], float], passes: int, fits: int = 1000) -> int:
    """So many passes while more rows wait than fit any of them; how many did not fit in memory."""
    failures = 0
    for _ in range(passes):
        rows = caps[KEY]
        if rows > fits:
            failures += 1
            caps.failed(KEY, rows)
        else:
            caps.passed(KEY, rows, pass_s(rows))
    return failures


def linear(rows: int) -> float:
    """The same time for every row, however many share a pass."""
    return 0.05 * rows


def until_eight(rows: int) -> float:
    """A device that computes eight rows at once."""
    return 0.05 * max(1.0, rows / 8)


def overhead(rows: int) -> float:
    """Larger passes are faster by the row: 114 rows a second at 16, 100 at 8."""
    return 0.02 + 0.0075 * rows


@pytest.mark.parametrize(("pass_s", "rows"), [(linear, 1), (until_eight, 8), (overhead, 16)])
def test_the_smallest_size_that_loses_no_speed_is_found(pass_s: Callable[[int], float], rows: int) -> None:
    caps = Caps(16)
    busy(caps, pass_s, 10 * TRIAL)
    assert caps.news(KEY) == rows


def test_sizes_rise_again_when_they_have_become_worth_it() -> None:
    caps = Caps(16)
    busy(caps, linear, 10 * TRIAL)
    busy(caps, overhead, 100 * TRIAL)
    assert caps.news(KEY) == 16


@pytest.mark.parametrize("pass_s", [until_eight, overhead])
def test_a_machine_that_is_busy_now_and_idle_then_changes_nothing(pass_s: Callable[[int], float]) -> None:
    """Passes take up to ten times as long for a while, and each one a little more or less than the last."""
    settled = Caps(16)
    busy(settled, pass_s, 10 * TRIAL)
    rng, caps, load = random.Random(1), Caps(16), [1.0]

    def uneven(rows: int) -> float:
        load[0] = min(10.0, max(1.0, load[0] * rng.uniform(0.9, 1.1)))
        return pass_s(rows) * load[0]

    busy(caps, uneven, 100 * TRIAL)
    assert caps.news(KEY) == settled.news(KEY)


def test_durations_that_are_known_a_pass_later_teach_the_same() -> None:
    """As on a device that computes while the next pass is prepared."""
    caps, last = Caps(16), 16
    for _ in range(10 * TRIAL):
        rows = caps[KEY]
        caps.passed(KEY, last, until_eight(last))
        last = rows
    assert caps.news(KEY) == 8


def test_passes_that_are_short_or_not_full_teach_nothing() -> None:
    caps = Caps(16)
    busy(caps, lambda rows: linear(rows) / 100, 10 * TRIAL)
    for _ in range(10 * TRIAL):
        caps.passed(KEY, 15, linear(15))
    assert caps.news(KEY) == 16


def test_what_does_not_fit_is_halved_and_tried_again_more_and_more_seldom() -> None:
    caps = Caps(16)
    failures = busy(caps, overhead, 100_000, fits=5)
    assert caps.news(KEY) == 4
    assert 4 <= failures <= 12
    busy(caps, overhead, 100_000)
    assert caps.news(KEY) == 16, "the memory is free again"


def test_a_pass_that_fails_during_a_trial_does_not_lower_the_cap() -> None:
    caps = Caps(16)
    busy(caps, overhead, 1, fits=15)
    assert caps.news(KEY) == 8
    busy(caps, overhead, 10 * TRIAL, fits=15)
    assert caps.news(KEY) is None, "nothing new"
    assert caps[KEY] == 8


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_what_was_learned_is_kept_for_models_that_compute_alike(tmp_path: Path) -> None:
    file = tmp_path / "caps.json"
    first = Caps(16, file, {"m": "weights-and-device"})
    busy(first, until_eight, 2 * TRIAL)
    assert Caps(16, file, {"m": "weights-and-device"})[KEY] == 8
    assert Caps(16, file, {"m": "other weights"})[KEY] == 16
    assert Caps(4, file, {"m": "weights-and-device"})[KEY] == 4
    assert list(tmp_path.iterdir()) == [file]


def test_a_larger_limit_counts_where_the_smaller_one_was_the_cap(tmp_path: Path) -> None:
    file = tmp_path / "caps.json"
    busy(Caps(16, file), overhead, 20 * TRIAL)
    assert Caps(64, file)[KEY] == 64


def test_servers_that_share_a_file_keep_each_other_s_entries(tmp_path: Path) -> None:
    file = tmp_path / "caps.json"
    one, other = Caps(16, file, {"m": "one"}), Caps(16, file, {"m": "other"})
    for caps in (one, other):
        busy(caps, until_eight, 2 * TRIAL)
    assert Caps(16, file, {"m": "one"})[KEY] == Caps(16, file, {"m": "other"})[KEY] == 8


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"m denoise 4x8x8": 3}', '{"m denoise 4x8x8": {"rows": 0, "wait": 1, "limit": 16}}',
     '{"m denoise 4x8x8": {"rows": "x", "wait": 1, "limit": 16}}', '{"m denoise 4x8x8": {"rows": 8}}',
     '{"m denoise 4x8x8": {"rows": 1e999, "wait": 1, "limit": 16}}', "\udcff"],
)  # fmt: skip
def test_a_file_that_says_nothing_useful_is_replaced(tmp_path: Path, text: str) -> None:
    file = tmp_path / "caps.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    caps = Caps(16, file)
    assert caps[KEY] == 16
    busy(caps, until_eight, 2 * TRIAL)
    assert Caps(16, file)[KEY] == 8


def test_a_file_that_cannot_be_written_costs_nothing_but_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    caps = Caps(16, tmp_path / "none" / "caps.json")
    busy(caps, until_eight, 10 * TRIAL)
    assert caps[KEY] == 8
    assert capsys.readouterr().out.count("cannot be kept") == 1


def test_callers_who_choose_many_shapes_fill_neither_memory_nor_the_file(tmp_path: Path) -> None:
    file = tmp_path / "caps.json"
    caps = Caps(16, file)
    for side in range(1, 3 * MOST):
        caps.failed(Key("m", Denoise, (4, side, side), None), 16)
    assert len(caps._caps) == len(json.loads(file.read_text())) == MOST


# --- in the engine ----------------------------------------------------------------------------------------------------


def edits(seeds: range) -> list[Job]:
    return [edit_job("toy", PX, SdEdit(0.5, 20), seed=seed) for seed in seeds]


def test_an_engine_starts_with_what_the_last_one_learned(tmp_path: Path) -> None:
    reports = []
    for _ in range(2):
        backend = ToyBackend("toy", Settings())
        backend.memory_rows = 5
        with Bench(backend, caps_file=tmp_path / "caps.json") as bench:
            bench.run(edits(range(8)))
            reports.append(bench.reports)
    first, second = ([r for r in each if isinstance(r, Split)] for each in reports)
    assert first
    assert not second
    told = [r for r in reports[1] if isinstance(r, Capped)]
    assert [(r.model, r.kind, r.pixels, r.rows) for r in told] == [("toy", "denoise", PX * PX, 4)]


def test_where_the_size_of_a_pass_changes_bits_nothing_is_learned() -> None:
    with Bench(ToyBackend("toy", Settings(), invariant=False)) as bench:
        bench.run(edits(range(3)))
        assert not any(isinstance(report, Capped) for report in bench.reports)
