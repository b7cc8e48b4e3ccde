"""Who shares the next pass: pure, and so cheap to try in thousands of ways."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from underpaint_server.engine.scheduler import WaitingRow, choose
from underpaint_server.rows import Decode, Denoise, Encode, Key, PullBack

SMALL = Key("m", Denoise, (4, 8, 8), None)
LARGE = Key("m", Denoise, (4, 16, 16), None)
PINNED = Key("m", Denoise, (4, 8, 8), 4)
DECODE = Key("m", Decode, (4, 8, 8), 2)
KEYS = (SMALL, LARGE, PINNED, DECODE, Key("m", Encode, (3, 32, 32), 2), Key("n", Denoise, (4, 8, 8), None))


def row(job: int, key: Key = SMALL, priority: int = 2, served: int = 0, index: int = 0) -> WaitingRow:
    return WaitingRow(job, index, key, priority, served)


def pick(*rows: WaitingRow, cap: int = 16, minimum: int = 1) -> Any:
    return choose(rows, lambda _: cap, lambda _: minimum)


def test_nothing_waits() -> None:
    assert pick() is None


def test_rows_of_all_jobs_share_a_pass_up_to_the_cap() -> None:
    chosen = pick(*(row(job, index=i) for job in range(10) for i in range(2)))
    assert len(chosen.rows) == chosen.size == 16


def test_a_lone_row_is_padded_to_the_minimum() -> None:
    assert pick(row(1), minimum=2).size == 2


def test_higher_priority_chooses_and_rides_first() -> None:
    chosen = pick(*(row(job) for job in range(20)), row(99, priority=3))
    assert chosen.rows[0].job == 99
    assert pick(*(row(job) for job in range(9)), row(99, LARGE, priority=3)).rows == (row(99, LARGE, 3),)


def test_the_job_served_longest_ago_chooses_the_shape() -> None:
    assert pick(row(1, SMALL, served=7), row(2, LARGE, served=3)).rows[0].job == 2


def test_encoders_and_decoders_go_before_the_network() -> None:
    assert pick(row(1, served=0), row(2, DECODE, served=9)).rows[0].job == 2


def test_derivatives_of_the_network_wait_their_turn_like_its_predictions() -> None:
    backward = Key("m", PullBack, (4, 8, 8), None)
    assert [r.job for r in pick(row(1, backward, served=5), row(2, served=4)).rows] == [2]
    assert [r.job for r in pick(row(1, backward, served=4), row(2, served=5)).rows] == [1]


def test_a_batch_class_is_kept_with_few_rows_and_with_many() -> None:
    few = pick(row(1, PINNED), row(2, PINNED, index=1), row(3, LARGE, served=5))
    assert ([t.job for t in few.rows], few.size) == ([1, 2], 4)
    many = pick(*(row(job, PINNED) for job in range(9)))
    assert (len(many.rows), many.size) == (4, 4)


def test_rows_of_another_class_do_not_share_a_pass() -> None:
    assert pick(row(1, SMALL), row(2, PINNED, served=1)).rows == (row(1, SMALL),)
    assert pick(row(1, PINNED), row(2, SMALL, served=1)).rows == (row(1, PINNED),)


rows = st.lists(
    st.builds(
        WaitingRow, st.integers(0, 9), st.integers(0, 3), st.sampled_from(KEYS), st.integers(1, 3), st.integers(0, 20)
    ),
    max_size=40,
    unique_by=lambda t: (t.job, t.index),
)


@given(rows, st.integers(2, 16))
def test_every_pass_is_sound(waiting: list[WaitingRow], cap: int) -> None:
    chosen = choose(waiting, lambda _: cap, lambda _: 2)
    if not waiting:
        assert chosen is None
        return
    assert 1 <= len(chosen.rows) <= chosen.size
    assert set(chosen.rows) <= set(waiting)
    (key,) = {t.key for t in chosen.rows}
    assert chosen.size == key.batch_class or (key.batch_class is None and chosen.size <= max(cap, 2))
    assert chosen.rows[0].priority == max(t.priority for t in waiting)


@given(rows, st.integers(2, 5))
def test_everyone_of_the_highest_priority_is_served_in_the_end(waiting: list[WaitingRow], cap: int) -> None:
    waiting = [WaitingRow(t.job, t.index, t.key, 2, t.served) for t in waiting]
    left, rounds = list(waiting), 0
    while left:
        chosen = choose(left, lambda _: cap, lambda _: 1)
        left = [t for t in left if t not in chosen.rows]
        rounds += 1
    assert rounds <= len(waiting)
