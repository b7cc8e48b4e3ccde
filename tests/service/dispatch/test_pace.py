"""What is known of the engine's speed, and when nothing is."""

import pytest
from underpaint_server.dispatch.pace import Pace


def test_one_slow_pass_locks_nobody_out() -> None:
    pace = Pace()
    for _ in range(10):
        pace.add(4, 0.04, 100.0)
    pace.add(2, 60.0, 101.0)
    assert pace.fast_row_s(101.0) == pytest.approx(0.01)
    assert pace.row_s > 0.01


def test_an_idle_engine_must_be_tried_to_be_known() -> None:
    pace = Pace()
    pace.add(2, 10.0, 100.0)
    assert pace.fast_row_s(101.0) == 5.0
    assert pace.fast_row_s(200.0) == 0.0
    pace.rest(200.0)
    assert pace.fast_row_s(200.0) == 0.0, "the first job after the idle time makes nothing known"
    pace.add(2, 1.0, 201.0)
    assert pace.fast_row_s(201.0) == 0.5


def test_a_short_rest_keeps_what_is_known() -> None:
    pace = Pace()
    pace.add(2, 10.0, 100.0)
    pace.rest(105.0)
    assert pace.fast_row_s(114.0) == 5.0
