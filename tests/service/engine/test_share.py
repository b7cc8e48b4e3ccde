"""Learning's share of the device."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engine import Bench
from support.jobs import edit_job, learn_job
from underpaint_server.backends.toy import SCALE, SHAPE, ToyBackend
from underpaint_server.engine.messages import Ended, Passed
from underpaint_server.engine.share import LOWER_SHARE, Share, Turns
from underpaint_server.jobs import Learned, Priority
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.settings import Settings

PX = SHAPE[1] * SCALE


@given(
    st.floats(0.05, 0.9),
    st.lists(st.tuples(st.floats(0.01, 0.5), st.floats(0.01, 0.5)), min_size=1, max_size=9),
)
def test_learning_gets_its_share_of_the_time_and_no_more(limit: float, costs: list[tuple[float, float]]) -> None:
    """Whatever passes cost: learning takes one whenever it may, the others all the rest."""
    share, learning, total = Share(limit), 0.0, 0.0
    for learning_s, other_s in costs * (400 // len(costs)):
        learns = share.is_open
        duration_s = learning_s if learns else other_s
        share.spend(duration_s, own=learns)
        learning, total = learning + learns * duration_s, total + duration_s
    # A pass is taken whole, so the share may be missed by about one.
    assert learning / total == pytest.approx(limit, abs=0.15)


def counted(
    turns: Turns, present: set[Priority], passes: int, durations: dict[Priority, float]
) -> dict[Priority, float]:
    """Seconds of each priority while jobs of all of ``present`` always have rows."""
    seconds = dict.fromkeys(Priority, 0.0)
    for _ in range(passes):
        turn = Priority(turns.next(present))
        seconds[turn] += durations[turn]
        turns.spend(durations[turn], turn, present)
    return seconds


@pytest.mark.parametrize("pass_s", [0.001, 0.03, 0.1])
def test_each_priority_below_the_highest_gets_its_share_and_no_more(pass_s: float) -> None:
    """However long passes are; and those of learning are several times longer than others."""
    durations = dict.fromkeys(Priority, pass_s) | {Priority.LEARNING: 4 * pass_s}
    seconds = counted(Turns(0.25), set(Priority), int(100 / pass_s), durations)
    shares = {priority: seconds[priority] / sum(seconds.values()) for priority in Priority}
    assert shares[Priority.LEARNING] == pytest.approx(0.25, abs=0.03)
    assert shares[Priority.BATCH] == shares[Priority.NORMAL] == pytest.approx(LOWER_SHARE, abs=0.03)


@pytest.mark.parametrize("low", [Priority.LEARNING, Priority.BATCH, Priority.NORMAL])
def test_who_comes_new_finds_no_debt_of_those_below(low: Priority) -> None:
    """Passes without competition count for nobody: not for what ran alone, nor as a claim of what came later."""
    durations = dict.fromkeys(Priority, 0.1)
    for alone in (low, Priority.INTERACTIVE):
        turns = Turns(0.25)
        counted(turns, {alone}, 1000, durations)
        seconds = counted(turns, {low, Priority.INTERACTIVE}, 20, durations)
        assert 0 < seconds[low] <= 0.25 * 20 * 0.1 + 0.1


def test_the_first_pass_beside_a_higher_priority_is_the_higher_ones() -> None:
    assert Turns(0.25).next(set(Priority)) == Priority.INTERACTIVE
    assert Turns(1.0).next({Priority.BATCH, Priority.NORMAL}) == Priority.NORMAL
    assert Turns(0.25).next({Priority.LEARNING}) == Priority.LEARNING


def test_learning_waits_for_others_and_still_gets_done() -> None:
    """Beside an edit, learning's passes are its share; when the edit is done, all are.

    On a clock by which every pass takes as long: on a busy machine one pass may take as long as a hundred.
    """
    readings = itertools.count()
    backend = ToyBackend("toy", Settings())
    with Bench(backend, clock=lambda: float(next(readings))) as bench:
        edit = (edit_job("toy", PX, SdEdit(1.0, 100), steps=100), Priority.NORMAL)
        bench.start_together({0: (learn_job("toy", PX), Priority.LEARNING), **dict.fromkeys(range(1, 5), edit)})
        outcomes = bench.until_ended(*range(5))
    assert isinstance(outcomes[0], Learned)
    ends = [r.id for r in bench.reports if isinstance(r, Ended)]
    assert ends[-1] == 0
    mixed = [r for r in bench.reports if isinstance(r, Passed) and {"learn", "sdedit"} <= r.rows_by_method.keys()]
    assert not mixed, "learning takes no places in the passes of others"


def test_pull_backs_of_several_learners_share_passes() -> None:
    backend = ToyBackend("toy", Settings())
    with Bench(backend) as bench:
        alone = bench.run([learn_job("toy", PX)])[0]
        several = bench.run([learn_job("toy", PX), learn_job("toy", PX), learn_job("toy", PX)])
        passes = [r for r in bench.reports if isinstance(r, Passed) and r.kind == "pullback"]
    assert max(sum(p.rows_by_method.values()) for p in passes) == 6
    assert all(each.state == alone.state for each in several)
