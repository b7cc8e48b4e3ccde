"""What a row costs depends on the model and on the size of the image."""

import pytest
from underpaint_server.dispatch.costs import RowCosts


def test_each_model_and_size_has_its_own_cost() -> None:
    costs = RowCosts()
    for _ in range(5):
        costs.add("a", 64 * 64, 4, 0.4)
        costs.add("a", 256 * 256, 2, 6.0)
        costs.add("b", 64 * 64, 1, 7.0)
    assert costs.row_s("a", 64 * 64) == pytest.approx(0.1)
    assert costs.row_s("a", 256 * 256) == pytest.approx(3.0)
    assert costs.row_s("b", 64 * 64) == pytest.approx(7.0)
    assert costs.row_s("c", 64 * 64) == 0


def test_an_unknown_size_is_estimated_from_the_nearest() -> None:
    costs = RowCosts()
    costs.add("a", 64 * 64, 1, 0.1)
    costs.add("a", 256 * 256, 1, 3.0)
    assert costs.row_s("a", 512 * 512) == pytest.approx(12.0)
    assert costs.row_s("a", 80 * 80) == pytest.approx(0.1 * 80 * 80 / 64 / 64)
    assert costs.row_s("a", 16 * 16) == pytest.approx(0.1 / 16)


def test_callers_who_choose_many_sizes_fill_no_memory() -> None:
    costs = RowCosts()
    for size in range(1, 10_000):
        costs.add("a", size, 1, 1.0)
    assert len(costs._row_s) == 64
    assert costs.row_s("a", 9_999) == 1.0
