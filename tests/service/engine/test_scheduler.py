"""Who shares the next pass: pure, and so cheap to try in thousands of ways."""

from random import Random
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


def row(job: int, key: Key = SMALL, priority: int = 2, due: float = 0.0, index: int = 0) -> WaitingRow:
    return WaitingRow(job, index, key, priority, due)


def pick(*rows: WaitingRow, cap: int = 16, minimum: int = 1, turn: int = 2) -> Any:
    return choose(rows, turn, lambda _: cap, lambda _: minimum)


def test_rows_of_all_jobs_share_a_pass_up_to_the_cap() -> None:
    chosen = pick(*(row(job, index=i) for job in range(10) for i in range(2)))
    assert len(chosen.rows) == chosen.size == 16


def test_a_lone_row_is_padded_to_the_minimum() -> None:
    assert pick(row(1), minimum=2).size == 2


def test_a_pass_is_of_the_priority_whose_turn_it_is() -> None:
    waiting = [*(row(job) for job in range(20)), row(99, priority=3), row(98, LARGE, priority=1)]
    assert [r.job for r in pick(*waiting, turn=3).rows] == [99]
    assert {r.job for r in pick(*waiting, turn=2).rows} == set(range(16))
    assert [r.job for r in pick(*waiting, turn=1).rows] == [98]


def test_other_priorities_take_the_places_that_would_be_padding_and_no_others() -> None:
    """The highest of them first; a pass of any size would be longer with them."""
    waiting = [row(1, PINNED), row(2, PINNED, 1), row(3, PINNED, 3), row(4, PINNED, 1), row(5, PINNED, 0)]
    assert [r.job for r in pick(*waiting).rows] == [1, 3, 2, 4]
    assert [r.job for r in pick(row(1), row(2, priority=1), minimum=2).rows] == [1, 2]
    assert [r.job for r in pick(row(1), row(2, priority=1)).rows] == [1]


def test_the_job_with_the_earliest_virtual_deadline_chooses_the_shape_and_joins_first() -> None:
    assert pick(row(1, SMALL, due=7), row(2, LARGE, due=3)).rows[0].job == 2
    assert [r.job for r in pick(*(row(job, due=-job) for job in range(9)), cap=3).rows] == [8, 7, 6]


def test_encoders_and_decoders_go_before_a_network_whose_passes_have_room() -> None:
    """Nothing is lost by waiting behind full passes; and the jobs behind them would fill an empty one."""
    decode = row(99, DECODE, due=9)
    assert pick(*(row(job) for job in range(11)), decode).rows == (decode,)
    assert len(pick(*(row(job) for job in range(12)), decode).rows) == 12


def test_encoders_and_decoders_that_fill_a_pass_go_before_any_network() -> None:
    network = [row(job) for job in range(40)]
    assert [r.job for r in pick(*network, row(98, DECODE, due=9), row(99, DECODE, due=8)).rows] == [99, 98]
    assert pick(*network, row(98, DECODE, due=9), row(99, DECODE, priority=1)).rows[0].key == SMALL


def test_an_encoder_or_decoder_whose_job_is_the_most_urgent_waits_for_nothing() -> None:
    assert pick(*(row(job, due=2) for job in range(40)), row(99, DECODE, due=1)).rows[0].job == 99


def test_derivatives_of_the_network_wait_their_turn_like_its_predictions() -> None:
    backward = Key("m", PullBack, (4, 8, 8), None)
    assert [r.job for r in pick(row(1, backward, due=5), row(2, due=4)).rows] == [2]
    assert [r.job for r in pick(row(1, backward, due=4), row(2, due=5)).rows] == [1]


def test_a_batch_class_is_kept_with_few_rows_and_with_many() -> None:
    few = pick(row(1, PINNED), row(2, PINNED, index=1), row(3, LARGE, due=5))
    assert ([t.job for t in few.rows], few.size) == ([1, 2], 4)
    many = pick(*(row(job, PINNED) for job in range(9)))
    assert (len(many.rows), many.size) == (4, 4)


def test_rows_of_another_class_do_not_share_a_pass() -> None:
    assert pick(row(1, SMALL), row(2, PINNED, due=1)).rows == (row(1, SMALL),)
    assert pick(row(1, PINNED), row(2, SMALL, due=1)).rows == (row(1, PINNED),)


rows = st.lists(
    st.builds(
        WaitingRow, st.integers(0, 9), st.integers(0, 3), st.sampled_from(KEYS), st.integers(0, 3), st.floats(0, 20)
    ),
    min_size=1,
    max_size=40,
    unique_by=lambda t: (t.job, t.index),
)


@given(rows, st.integers(2, 16), st.randoms(use_true_random=False))
def test_every_pass_is_sound(waiting: list[WaitingRow], cap: int, random: Random) -> None:
    turn = random.choice(waiting).priority
    chosen = pick(*waiting, turn=turn, cap=cap, minimum=2)
    assert 1 <= len(chosen.rows) <= chosen.size
    assert set(chosen.rows) <= set(waiting)
    (key,) = {t.key for t in chosen.rows}
    assert chosen.size == key.batch_class or (key.batch_class is None and chosen.size <= max(cap, 2))
    assert chosen.rows[0].priority == turn
    others = sum(t.priority != turn for t in chosen.rows)
    assert not others or chosen.size == (key.batch_class or 2), "others take places of padding only"
    shuffled = random.sample(waiting, len(waiting))
    assert pick(*shuffled, turn=turn, cap=cap, minimum=2).size == chosen.size, "in whatever order they are listed"


@given(rows, st.integers(2, 5))
def test_everyone_of_the_highest_priority_is_served_in_the_end(waiting: list[WaitingRow], cap: int) -> None:
    waiting = [WaitingRow(t.job, t.index, t.key, 2, t.due) for t in waiting]
    left, rounds = list(waiting), 0
    while left:
        chosen = pick(*left, cap=cap)
        left = [t for t in left if t not in chosen.rows]
        rounds += 1
    assert rounds <= len(waiting)
