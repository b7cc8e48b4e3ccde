"""What is known of the engine's speed, and which deadlines are known to be impossible."""

import pytest
from underpaint_server.dispatch.pace import Pace
from underpaint_server.jobs import Phase
from underpaint_server.methods.cost import Stage

PX = 512 * 512
STEPS = (Stage(Phase.DENOISING, 50, 2),)
"""Fifty guided steps: fifty passes of two rows, if it runs alone."""
MASK = (Stage(Phase.MASKING, 1, 40),)
"""Forty rows at once."""


def paced(rows: int, duration_s: float, passes: int = 20) -> Pace:
    """The pace after equal passes, the last at 100 s."""
    pace = Pace(max_rows=16)
    for _ in range(passes):
        pace.add("m", PX, rows, duration_s, 100.0)
    return pace


def test_one_slow_pass_locks_nobody_out() -> None:
    pace = paced(2, 0.1)
    pace.add("m", PX, 2, 60.0, 101.0)
    assert pace.least_s("m", PX, STEPS, 101.0) == pytest.approx(5)


@pytest.mark.parametrize("idle_s", [11.0, 1_000.0, 1_000_000.0])
def test_an_idle_time_of_any_length_forgets_nothing(idle_s: float) -> None:
    pace = paced(2, 0.1)
    assert pace.least_s("m", PX, STEPS, 100.0 + idle_s) == pytest.approx(2.5), "with a margin"


def test_the_first_slow_passes_of_a_new_engine_refuse_nobody() -> None:
    pace = paced(2, 60.0, passes=3)
    assert pace.least_s("m", PX, STEPS, 100.0) == 0
    for _ in range(10):
        pace.add("m", PX, 2, 0.1, 101.0)
    assert pace.least_s("m", PX, STEPS, 101.0) == pytest.approx(5)


def test_each_model_has_a_pace_of_its_own() -> None:
    pace = paced(2, 0.1)
    assert pace.least_s("other", PX, STEPS, 100.0) == 0


def test_each_size_has_a_pace_of_its_own() -> None:
    """A small image may take much less time than the fastest large one did."""
    pace = paced(2, 0.1)
    assert pace.least_s("m", PX // 4, STEPS, 100.0) == 0
    assert pace.least_rows_s("m", PX // 4, 200, 100.0) == 0
    for side in range(1000):
        pace.add("m", side * side, 2, 0.1, 100.0)
    assert len(pace._best) == 64


def test_rows_that_go_first_count_at_the_best_pace_of_a_row() -> None:
    pace = paced(2, 0.1)
    assert pace.least_rows_s("m", PX, 200, 100.0) == pytest.approx(10)
    assert pace.least_rows_s("m", PX, 200, 200.0) == pytest.approx(5), "with a margin"


def test_narrow_passes_say_little_of_wide_ones() -> None:
    pace = paced(2, 0.1)
    assert pace.least_s("m", PX, MASK, 100.0) == pytest.approx(0.3), "three passes of at most 16 rows"
    pace.add("m", PX, 16, 0.12, 100.0)  # on a GPU: hardly more than a narrow one
    assert pace.least_s("m", PX, MASK, 100.0) == pytest.approx(0.3)
    cpu = paced(2, 0.1)
    cpu.add("m", PX, 16, 0.8, 100.0)
    assert cpu.least_s("m", PX, MASK, 100.0) == pytest.approx(2.0)


def test_wide_passes_do_not_make_many_steps_fast() -> None:
    pace = paced(16, 0.1)
    assert pace.least_s("m", PX, STEPS, 100.0) == pytest.approx(5), "fifty passes, however narrow"
