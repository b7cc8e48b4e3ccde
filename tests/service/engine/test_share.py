"""Learning's share of the device."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engine import Bench
from support.jobs import edit_job, learn_job
from underpaint_server.backends.toy import SCALE, SHAPE, ToyBackend
from underpaint_server.engine import loop
from underpaint_server.engine.messages import Ended, Passed
from underpaint_server.engine.share import Share
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
        share.spend(duration_s, float(learns))
        learning, total = learning + learns * duration_s, total + duration_s
    # A pass is taken whole, so the share may be missed by about one.
    assert learning / total == pytest.approx(limit, abs=0.15)


def test_learning_waits_for_others_and_still_gets_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an edit, learning's passes are its share; when the edit is done, all are.

    On a clock by which every pass takes as long: on a busy machine one pass may take as long as a hundred.
    """
    readings = itertools.count()
    monkeypatch.setattr(loop, "now", lambda: float(next(readings)))
    backend = ToyBackend("toy", Settings())
    with Bench(backend) as bench:
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
