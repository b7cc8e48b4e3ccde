"""The loop: sharing, progress, cancellation, deadlines, failures; on the closed-form network."""

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.engine import Bench
from support.jobs import diffedit, edict_options, edit_job, every_kind_of_job, injection, injection_job, invert_job
from support.waiting import PATIENCE_S
from underpaint_server.backends.protocol import DeviceLost
from underpaint_server.backends.toy import SCALE, SHAPE, ToyBackend
from underpaint_server.engine.failures import reported
from underpaint_server.engine.loop import Engine
from underpaint_server.engine.messages import Advanced, Ended, ExtendJob, Passed, Previewed, Split, StartJob
from underpaint_server.errors import (
    Bug,
    Cancelled,
    DeadlinePassed,
    ModelNonFinite,
    ModelNotFound,
    NonFiniteLatents,
    OutOfMemory,
)
from underpaint_server.jobs import (
    Descent,
    Edited,
    EditJob,
    Generated,
    InversionOptions,
    Inverted,
    Job,
    Learned,
    LearnJob,
    Phase,
    Priority,
    Stored,
)
from underpaint_server.methods import job_name
from underpaint_server.methods.edict.options import EdictEdit, EdictInversion
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.plans import plan, total_rows
from underpaint_server.rows import Batch, Decode, Denoise, is_network_row
from underpaint_server.settings import Settings

PX = SHAPE[1] * SCALE


def toy(invariant: bool = True) -> ToyBackend:
    return ToyBackend("toy", Settings(), invariant=invariant)


def same(one: Any, other: Any) -> bool:
    """Equal results, apart from what they cost."""
    if isinstance(one, Edited):
        return np.array_equal(one.pixels, other.pixels) and (one.mask is None or np.array_equal(one.mask, other.mask))
    if isinstance(one, Inverted):
        pairs = zip(one.inversion.arrays.values(), other.inversion.arrays.values(), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)
    if isinstance(one, Learned):
        return bool(one.state == other.state)
    return np.array_equal(one.mask, other.mask)


def test_every_job_asks_for_the_rows_of_its_plan() -> None:
    with Bench(toy()) as bench:
        first = bench.run([invert_job("toy", PX), invert_job("toy", PX, edict_options())])
        stored = {"edict": first[0].inversion}
        jobs = every_kind_of_job("toy", PX, inversions=stored)
        for job, result in zip(jobs, bench.run(jobs), strict=True):
            assert result.usage.network_evaluations == total_rows(job), job
            phases = [stage.phase for stage in plan(job)]
            assert [p for p in result.usage.phase_s if p not in (Phase.ENCODING, Phase.DECODING)] == phases
            assert len(set(phases)) == len(phases)


def test_an_injection_asks_for_what_its_plan_says_whatever_is_stored_already() -> None:
    """Both inversions, either, or none; and both in lockstep, so that they take as many passes as one."""
    job = injection_job("toy", PX, injection(calibration=0.3, every=2))
    assert job.companion is not None
    with Bench(toy()) as bench:
        (made,) = bench.run([job])
        source, content = Stored(made.inversion), replace(job.companion, source=Stored(made.companion))
        assert (made.usage.network_evaluations, len(bench.passes)) == (20 + 20 + 20 + 6 * 2, 20 + 20 + 6)
        others = [
            replace(job, source=source),
            replace(job, companion=content),
            replace(job, source=source, companion=content),
        ]
        for other, rows in zip(others, (52, 52, 32), strict=True):
            (result,) = bench.run([other])
            assert result.usage.network_evaluations == total_rows(other) == rows
            assert (result.inversion is None, result.companion is None) == (
                other.source is source,
                other.companion is content,
            )
            assert np.array_equal(result.pixels, made.pixels)


def test_steps_of_an_injection_are_counted_though_they_cost_differently() -> None:
    job = injection_job("toy", PX, injection(calibration=0.3, every=2), steps=5)
    inverting, denoising = plan(job)
    assert (inverting.rows, inverting.steps_in(7), denoising.extra) == (10, 3, (2, 0, 2, 0, 0))
    assert [denoising.steps_in(rows) for rows in range(denoising.rows + 1)] == [0, 0, 0, 1, 2, 2, 2, 3, 4, 5]


def test_previews_of_an_injection_show_the_mixed_guess() -> None:
    job = injection_job("toy", PX, injection(weight=1.0))
    with Bench(Slow("toy", Settings())) as bench:
        bench.start(1, job, preview_every=1)
        outcome = bench.until_ended(1)[1]
        shown = [r.preview.pixels for r in bench.reports if isinstance(r, Previewed)]
    assert isinstance(outcome, Edited)
    assert len(shown) > 10
    assert shown[0].shape == outcome.pixels.shape


def test_jobs_of_all_kinds_share_passes_and_get_what_they_get_alone() -> None:
    jobs = every_kind_of_job("toy", PX)
    with Bench(toy()) as bench:
        alone = [bench.run([job])[0] for job in jobs]
    with Bench(toy()) as bench:
        together = bench.run(jobs)
        rows = sum(sum(p.rows_by_method.values()) for p in bench.passes)
        assert rows / len(bench.passes) > 4
        assert any(len(p.rows_by_method) >= 4 for p in bench.passes)
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_jobs_of_all_kinds_keep_the_batch_class_where_the_size_matters() -> None:
    """On a network whose answers drift with the size of the pass: padded, shared, and the same bits under load."""
    jobs = every_kind_of_job("toy", PX)
    with Bench(toy(invariant=False)) as bench:
        alone = [bench.run([job])[0] for job in jobs]
    with Bench(toy(invariant=False)) as bench:
        together = bench.run(jobs)
        sizes = {(p.kind, p.padding + sum(p.rows_by_method.values())) for p in bench.passes}
        assert sizes == {("denoise", 4), ("pullback", 2)}
        assert any(len(p.rows_by_method) >= 3 for p in bench.passes)
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert alone[0].inversion.reconstruction_max_abs_error <= 1e-10
    assert alone[0].inversion.batch_class == 4


def test_an_inversion_replays_its_own_batch_class() -> None:
    with Bench(toy(invariant=False)) as bench:
        (made,) = bench.run([invert_job("toy", PX)])
    bench_settings = Settings(exact_batch_class=8)
    with Bench(ToyBackend("toy", bench_settings, invariant=False)) as bench:
        source = Stored(made.inversion)
        bench.run([EditJob("toy", source, made.inversion.options, EdictEdit(), "x", "", 3.0, 1)])
        assert {p.padding + sum(p.rows_by_method.values()) for p in bench.passes} == {4}


def test_a_group_wider_than_a_pass_is_spread_over_several() -> None:
    with Bench(toy(), max_batch_size=4) as bench:
        (result,) = bench.run([edit_job("toy", PX, diffedit(samples=9))])
        assert max(sum(p.rows_by_method.values()) for p in bench.passes) == 4
    with Bench(toy()) as bench:
        assert same(result, bench.run([edit_job("toy", PX, diffedit(samples=9))])[0])


class Slow(ToyBackend):
    """Takes so long for every pass that a job lasts longer than the pause between two reports of its progress."""

    def predict(self, batch: Batch) -> Sequence[Any]:
        time.sleep(0.005)
        return super().predict(batch)


class Halting(ToyBackend):
    """Halts in its fifth pass of the network until it may go on, so that something can happen in the midst of a job."""

    def __init__(self) -> None:
        super().__init__("toy", Settings())
        self.halted, self.go_on = threading.Event(), threading.Event()
        self._passes = 0

    def predict(self, batch: Batch) -> Sequence[Any]:
        if isinstance(batch.rows[0], Denoise):
            self._passes += 1
            if self._passes == 5:
                self.halted.set()
                assert self.go_on.wait(PATIENCE_S)
        return super().predict(batch)


def test_cancelled_rows_are_gone_before_the_next_pass() -> None:
    backend = Halting()
    with Bench(backend) as bench:
        bench.start(1, invert_job("toy", PX, edict_options(200)))
        bench.start(2, invert_job("toy", PX, edict_options(20)))
        assert backend.halted.wait(PATIENCE_S)
        bench.cancel(1)
        backend.go_on.set()
        outcomes = bench.until_ended(1, 2)
        ended = next(i for i, r in enumerate(bench.reports) if isinstance(r, Ended) and r.id == 1)
        after = [r for r in bench.reports[ended:] if isinstance(r, Passed) and r.is_network]
    assert isinstance(outcomes[1], Cancelled)
    assert isinstance(outcomes[2], Inverted)
    assert after
    assert {sum(p.rows_by_method.values()) for p in after} == {2}, "only the other job's pair is left"


def test_a_passed_deadline_ends_the_job_and_only_it() -> None:
    backend = Halting()
    with Bench(backend) as bench:
        bench.start(1, invert_job("toy", PX, edict_options(200)), deadline_s=0.1)
        passed = time.monotonic() + 0.1
        bench.start(2, invert_job("toy", PX, edict_options(20)), deadline_s=3600)
        assert backend.halted.wait(PATIENCE_S)
        time.sleep(max(0.0, passed - time.monotonic()))
        backend.go_on.set()
        outcomes = bench.until_ended(1, 2)
    assert isinstance(outcomes[1], DeadlinePassed)
    assert isinstance(outcomes[2], Inverted)


def test_a_later_deadline_takes_the_place_of_the_first() -> None:
    backend = Halting()
    with Bench(backend) as bench:
        for id_ in (1, 2):
            bench.start(id_, invert_job("toy", PX, edict_options(20)), deadline_s=3600)
        assert backend.halted.wait(PATIENCE_S)
        bench.inbox.put(ExtendJob(1, time.monotonic() - 1))
        bench.inbox.put(ExtendJob(2, time.monotonic() - 1))
        bench.inbox.put(ExtendJob(2, None))
        backend.go_on.set()
        outcomes = bench.until_ended(1, 2)
    assert isinstance(outcomes[1], DeadlinePassed)
    assert isinstance(outcomes[2], Inverted)


class Poisoned(ToyBackend):
    """Fails every pass that holds a row of one text."""

    def predict(self, batch: Batch) -> Sequence[Any]:
        if any(isinstance(r, Denoise) and float(r.prompt_embeds.flatten()[0]) == self.poison for r in batch.rows):
            raise RuntimeError("poison")
        return super().predict(batch)

    def arm(self, text: str) -> None:
        from underpaint_server.rows import Embed

        self.poison = float(self._answer(Embed(text), 1).prompt_embeds.flatten()[0])


def test_one_jobs_failure_never_touches_another() -> None:
    backend = Poisoned("toy", Settings())
    backend.arm("a cursed circle")
    cursed = EditJob(
        "toy", edit_job("toy", PX, SdEdit(0.5, 20)).source, None, SdEdit(0.5, 20), "a cursed circle", "", 3.0, 1
    )
    healthy = edit_job("toy", PX, SdEdit(0.5, 20))
    with Bench(backend) as bench:
        outcomes = bench.run([healthy, cursed, healthy])
        assert [type(o) for o in outcomes] == [Edited, Bug, Edited]
        assert "poison" not in outcomes[1].message, "text of an unknown error stays in the log"
        assert "the server log has it as job" in outcomes[1].message
        assert any(isinstance(r, Split) and r.reason == "error" for r in bench.reports)


def test_an_error_inside_a_generator_ends_that_job_alone() -> None:
    with Bench(toy()) as bench:
        broken = invert_job("toy", PX, edict_options(20, guidance_scale=float("inf")))
        outcomes = bench.run([broken, invert_job("toy", PX)])
    assert [type(o) for o in outcomes] == [NonFiniteLatents, Inverted]


def test_a_full_device_halves_the_batch_and_remembers() -> None:
    backend = toy()
    backend.memory_rows = 5
    jobs = every_kind_of_job("toy", PX)
    with Bench(backend) as bench:
        outcomes = bench.run(jobs)
        assert any(isinstance(r, Split) and r.reason == "oom" for r in bench.reports)
        too_large = [p.kind for p in bench.passes if sum(p.rows_by_method.values()) > 5]
        assert len(too_large) == len(set(too_large)), "a kind of row is tried once in too large a pass"
        assert "denoise" in too_large
    with Bench(toy()) as bench:
        assert all(same(a, b) for a, b in zip(outcomes, bench.run(jobs), strict=True))


def test_what_does_not_even_fit_alone_says_so() -> None:
    backend = toy()
    backend.memory_rows = 0
    with Bench(backend) as bench:
        jobs = every_kind_of_job("toy", PX)
        outcomes = bench.run(jobs)
        assert [type(outcome) for outcome in outcomes] == [OutOfMemory] * len(jobs)
        assert all(outcome.metadata == {"width": str(PX), "height": str(PX)} for outcome in outcomes)
        assert all(f"{PX}x{PX} pixels" in outcome.message for outcome in outcomes)


WILD = InversionOptions(EdictInversion(mixing_coefficient=1e-6), 50, 1.0, 3.0, "")


@pytest.mark.parametrize(
    ("job", "paths"),
    [
        (replace(edit_job("toy", PX, EdictEdit()), inversion=WILD),
         ["inversion_parameters.edict.mixing_coefficient"]),
        (invert_job("toy", PX, WILD), ["parameters.edict.mixing_coefficient"]),
        (invert_job("toy", PX, edict_options(20, guidance_scale=float("inf"))), ["parameters.guidance_scale"]),
    ],
)  # fmt: skip
def test_latents_that_grow_without_limit_are_explained_by_what_was_asked(
    job: Any, paths: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with Bench(toy()) as bench:
        (outcome,) = bench.run([job])
    assert isinstance(outcome, NonFiniteLatents)
    assert [violation.path for violation in outcome.violations] == paths
    assert all(path in outcome.message for path in paths)
    assert "Traceback" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("job", "paths"),
    [
        (edit_job("toy", PX, EdictEdit(), steps=500), ["inversion_parameters.steps"]),
        (replace(edit_job("toy", PX, SdEdit(0.5, 500)), guidance_scale=30.0), ["guidance_scale", "sdedit.steps"]),
        (replace(invert_job("toy", PX), options=replace(WILD, guidance_scale=16.0)),
         ["parameters.guidance_scale", "parameters.edict.mixing_coefficient"]),
        (edit_job("toy", PX, EdictEdit(), Generated("a dog", 1, PX, PX, 150)), ["generated.steps"]),
        (edit_job("toy", PX, SdEdit(0.5, 50)), []),
    ],
)  # fmt: skip
def test_every_extreme_value_is_named_where_it_is_in_the_request(job: Any, paths: list[str]) -> None:
    error = reported(NonFiniteLatents("NaN"), 1, job)
    assert isinstance(error, NonFiniteLatents) if paths else isinstance(error, ModelNonFinite)
    assert [violation.path for violation in getattr(error, "violations", ())] == paths


class Broken(ToyBackend):
    """Predicts NaN, whatever is asked."""

    def predict(self, batch: Batch) -> Sequence[Any]:
        answers = super().predict(batch)
        is_network = is_network_row(type(batch.rows[0]))
        return [answer * float("nan") for answer in answers] if is_network else answers


@pytest.mark.parametrize("path", ["direction.guidance_scale", "learning_rate"])
def test_learning_that_grows_without_limit_is_explained_by_what_was_asked(path: str) -> None:
    learning = next(job for job in every_kind_of_job("toy", PX) if isinstance(job, LearnJob))
    if path == "learning_rate":
        options = replace(learning.options, method=Descent(optimization_steps=3, learning_rate=float("inf")))
    else:
        options = replace(learning.options, guidance_scale=float("inf"))
    with Bench(toy()) as bench:
        (outcome,) = bench.run([replace(learning, options=options, state=None)])
    assert isinstance(outcome, NonFiniteLatents)
    assert [violation.path for violation in outcome.violations] == [path]


def test_numbers_that_a_usual_request_did_not_cause_are_the_model_s_fault() -> None:
    with Bench(Broken("toy", Settings())) as bench:
        (outcome,) = bench.run([edit_job("toy", PX, SdEdit(0.5, 20))])
    assert isinstance(outcome, ModelNonFinite)


def test_a_pinned_pass_that_does_not_fit_fails_rather_than_change_bits() -> None:
    backend = toy(invariant=False)
    backend.memory_rows = 3
    with Bench(backend) as bench:
        assert isinstance(bench.run([edit_job("toy", PX, SdEdit(0.5, 20))])[0], OutOfMemory)
        assert not any(isinstance(report, Split) for report in bench.reports)


class BlindDecoder(ToyBackend):
    """Fails its first decoding, which here is a preview."""

    failures = 1

    def predict(self, batch: Batch) -> Sequence[Any]:
        if isinstance(batch.rows[0], Decode) and self.failures:
            self.failures -= 1
            raise OutOfMemory("no room for the decoder")
        return super().predict(batch)


def test_a_preview_that_fails_is_left_out() -> None:
    with Bench(BlindDecoder("toy", Settings())) as bench:
        bench.start(1, edit_job("toy", PX, EdictEdit()), preview_every=4)
        bench.start(2, edit_job("toy", PX, EdictEdit()))
        outcomes = bench.until_ended(1, 2)
        assert [p.preview.step for p in bench.reports if isinstance(p, Previewed)] == [8, 12]
    assert all(isinstance(outcome, Edited) for outcome in outcomes.values())


class Lost(ToyBackend):
    """A device that computes nothing any more."""

    def predict(self, batch: Batch) -> Sequence[Any]:
        if isinstance(batch.rows[0], Denoise):
            raise DeviceLost("illegal memory access")
        return super().predict(batch)


def test_a_lost_device_ends_the_loop_so_that_the_process_is_replaced() -> None:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    reports: list[Any] = []
    inbox.put(StartJob(1, invert_job("toy", PX), Priority.NORMAL, time.monotonic(), None, 0))
    with pytest.raises(DeviceLost):
        Engine({"toy": Lost("toy", Settings())}, inbox, reports.append, 16, 0.25).run()
    assert not any(isinstance(report, Ended) for report in reports)


def test_an_unknown_model_is_named() -> None:
    with Bench(toy()) as bench:
        (outcome,) = bench.run([invert_job("other", PX)])
    assert isinstance(outcome, ModelNotFound)


def test_interactive_work_goes_before_batch_work() -> None:
    backend = Halting()
    with Bench(backend, max_batch_size=2) as bench:
        bench.start(1, invert_job("toy", PX, edict_options(20)), priority=Priority.BATCH)
        assert backend.halted.wait(PATIENCE_S)
        bench.start(2, invert_job("toy", PX, edict_options(20)), priority=Priority.INTERACTIVE)
        backend.go_on.set()
        bench.until_ended(1, 2)
        order = [r.id for r in bench.reports if isinstance(r, Ended)]
    assert order == [2, 1]


def test_progress_never_falls_and_previews_come_when_asked() -> None:
    with Bench(Slow("toy", Settings())) as bench:
        bench.start(1, edit_job("toy", PX, EdictEdit()), preview_every=4)
        bench.start(2, edit_job("toy", PX, EdictEdit()))
        bench.until_ended(1, 2)
        fractions = [r.progress.fraction for r in bench.reports if isinstance(r, Advanced) and r.id == 1]
        previews = [r for r in bench.reports if isinstance(r, Previewed)]
    assert fractions == sorted(fractions)
    assert len(fractions) > 2
    assert {p.id for p in previews} == {1}
    assert [p.preview.step for p in previews] == [4, 8, 12]
    assert previews[0].preview.pixels.shape == (PX, PX, 3)


@pytest.mark.parametrize(
    ("job", "name"),
    [
        (invert_job("toy", PX), "invert_edict"),
        (edit_job("toy", PX, SdEdit(0.5, 20)), "sdedit"),
    ],
)
def test_jobs_have_names(job: Job, name: str) -> None:
    assert job_name(job) == name
