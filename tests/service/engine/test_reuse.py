"""Rows with equal names are computed once, whenever they come, and nobody's result has other bits for it."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.engine import Bench as Engine
from support.jobs import (
    content_options,
    ddim_options,
    diffedit,
    disc,
    disentangled,
    edict_options,
    edit_job,
    every_kind_of_job,
    injection,
    injection_job,
    invert_job,
)
from support.waiting import PATIENCE_S
from underpaint_server.backends.protocol import Backend
from underpaint_server.backends.toy import SCALE, SHAPE, ToyBackend
from underpaint_server.engine.messages import Ended, Passed, Report, Reused
from underpaint_server.engine.reuse import OVERHEAD, Answers
from underpaint_server.engine.scheduler import WaitingRow
from underpaint_server.errors import Bug, Cancelled, OutOfMemory
from underpaint_server.jobs import (
    Companion,
    Edited,
    EditJob,
    Generated,
    Inverted,
    Job,
    Learned,
    MaskJob,
    Photo,
    Priority,
    Stored,
    Usage,
)
from underpaint_server.methods.ddim.options import DdimEdit
from underpaint_server.methods.edict.options import EdictEdit
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.rows import Batch, Captured, Denoise, Embed, Key
from underpaint_server.settings import Settings

PX = SHAPE[1] * SCALE
N = 16
"""Used steps of the inversions of these jobs: 20 steps with a strength of 0.8."""
PROMPTS = ("a green circle", "a blue circle", "a square", "a red dog")


class Bench(Engine):
    """An engine that keeps answers."""

    def __init__(self, backend: Backend, max_batch_size: int = 16, *, reuse_bytes: int = 2**28) -> None:
        super().__init__(backend, max_batch_size, reuse_bytes=reuse_bytes)


def toy(invariant: bool = True) -> ToyBackend:
    return ToyBackend("toy", Settings(), invariant=invariant)


def prompted(job: EditJob, prompts: Sequence[str] = PROMPTS) -> list[EditJob]:
    """The same edit with each of these prompts."""
    return [replace(job, target_prompt=prompt) for prompt in prompts]


def computed(bench: Bench) -> int:
    """Network rows that were computed."""
    return sum(sum(one.rows_by_method.values()) for one in bench.passes)


def alone(jobs: Sequence[Job], backend: ToyBackend | None = None) -> list[Any]:
    """The outcomes of jobs that each find an engine which has done nothing before."""
    outcomes = []
    for job in jobs:
        with Bench(backend or toy()) as bench:
            outcomes += bench.run([job])
    return outcomes


def bits(outcome: Any) -> Any:
    """All of a result but what it cost, as values that are equal if their bits are."""
    if isinstance(outcome, Edited):
        mask = None if outcome.mask is None else outcome.mask.tobytes()
        made = [bits(Inverted(one, Usage())) for one in (outcome.inversion, outcome.companion) if one is not None]
        return outcome.pixels.tobytes(), mask, made, outcome.notices
    if isinstance(outcome, Inverted):
        return {name: array.tobytes() for name, array in outcome.inversion.arrays.items()}
    if isinstance(outcome, Learned):
        return outcome.state
    return outcome.mask.tobytes(), outcome.difference.tobytes()


def assert_same(ones: Sequence[Any], others: Sequence[Any]) -> None:
    assert [bits(one) for one in ones] == [bits(other) for other in others]


EDICT, DDIM, DIFFEDIT = (
    edit_job("toy", PX, EdictEdit()),
    edit_job("toy", PX, DdimEdit()),
    edit_job("toy", PX, diffedit()),
)


@pytest.mark.parametrize("invariant", [True, False])
@pytest.mark.parametrize(
    ("job", "shared", "own"),
    [
        (EDICT, 4 * N, 4 * N),
        (DDIM, N, 2 * N),
        (DIFFEDIT, N + 5, 5 + 2 * N),  # five samples of the mask for each of its two prompts
        (edit_job("toy", PX, SdEdit(0.5, 20), Generated("a red apple", 5, PX, PX, 20)), 2 * 20, 2 * 10),
        (edit_job("toy", PX, disentangled()), 2 * 20, 2 * 20),  # its residuals are those of the source prompt
    ],
    ids=["edict", "ddim", "diffedit", "sdedit of a generated source", "disentangled"],
)
def test_prompts_on_one_source_share_what_does_not_depend_on_the_prompt(
    job: EditJob, shared: int, own: int, invariant: bool
) -> None:
    jobs = prompted(job)
    with Bench(toy(invariant)) as bench:
        together = bench.run(jobs)
        assert computed(bench) == shared + len(jobs) * own
        assert sum(r.rows for r in bench.reports if isinstance(r, Reused) and r.kind == "denoise") == 3 * shared
        assert {one.usage.network_evaluations for one in together} == {shared + own}
        assert sum(one.usage.reused_evaluations for one in together) == 3 * shared
    with Bench(toy(invariant)) as bench:
        after_another = [bench.run([job])[0] for job in jobs]
        assert computed(bench) == shared + len(jobs) * own
        assert [one.usage.reused_evaluations for one in after_another] == [0, shared, shared, shared]
    with Bench(toy(invariant), reuse_bytes=0) as bench:
        separate = bench.run(jobs)
        assert computed(bench) == len(jobs) * (shared + own)
        assert not any(isinstance(report, Reused) for report in bench.reports)
        assert not any(one.usage.reused_evaluations for one in separate)
    expected = alone(jobs, toy(invariant))
    for outcomes in (together, after_another, separate):
        assert_same(outcomes, expected)


def test_styles_with_one_content_share_its_inversion() -> None:
    job = injection_job("toy", PX, injection())
    jobs = [replace(job, source=Photo(disc(PX, (200, 30, colour)))) for colour in range(3)]
    with Bench(toy()) as bench:
        together = bench.run(jobs)
        assert computed(bench) == sum(one.usage.network_evaluations for one in together) - 2 * 20
    assert_same(together, alone(jobs))


def test_an_image_is_both_content_and_source_of_other_jobs() -> None:
    """Whoever inverts it, and for what, with the same options."""
    photo, options = Photo(disc(PX)), content_options()
    jobs: list[Job] = [
        replace(invert_job("toy", PX, options, verify=False), source=photo),
        replace(injection_job("toy", PX, injection()), companion=Companion(photo, options)),
        replace(DDIM, source=photo, inversion=options),
    ]
    with Bench(toy()) as bench:
        together = bench.run(jobs)
        assert sum(one.usage.reused_evaluations for one in together) == 2 * 20
    assert_same(together, alone(jobs))


def test_a_mask_computed_before_its_edit_is_not_computed_again() -> None:
    edit = edit_job("toy", PX, diffedit())
    assert edit.inversion is not None
    mask = MaskJob(
        "toy", edit.source, edit.inversion, edit.method, edit.target_prompt, "", edit.guidance_scale, edit.seed
    )
    with Bench(toy()) as bench:
        (made,) = bench.run([mask])
        (edited,) = bench.run([edit])
        again = bench.run([replace(edit, source=Stored(edited.inversion))])
    assert edited.usage.reused_evaluations == made.usage.network_evaluations == 10
    assert again[0].usage.reused_evaluations == 10, "a stored inversion has the latents of its photo"
    assert np.array_equal(made.mask, edited.mask)
    assert_same([edited], alone([edit]))
    assert np.array_equal(again[0].pixels, edited.pixels)


class Halting(ToyBackend):
    """Halts in its twentieth pass of the network, in which a lone EDICT inversion has done ten steps."""

    def __init__(self, at: int = 20) -> None:
        super().__init__("toy", Settings())
        self.halted, self.go_on = threading.Event(), threading.Event()
        self._passes, self._at = 0, at

    def predict(self, batch: Batch) -> Sequence[Any]:
        if isinstance(batch.rows[0], Denoise):
            self._passes += 1
            if self._passes == self._at:
                self.halted.set()
                assert self.go_on.wait(PATIENCE_S)
        return super().predict(batch)


@pytest.mark.parametrize("reuse_bytes", [2**28, 40_000])
def test_one_who_comes_ten_steps_late_shares_all_steps(reuse_bytes: int) -> None:
    """Those that were done before it came too, if they are kept."""
    backend, (first, second) = Halting(), prompted(EDICT, PROMPTS[:2])
    with Bench(backend, reuse_bytes=reuse_bytes) as bench:
        bench.start(1, first)
        assert backend.halted.wait(PATIENCE_S)
        bench.start(2, second)
        backend.go_on.set()
        outcomes = bench.until_ended(1, 2)
        rows = computed(bench)
    if reuse_bytes == 2**28:
        assert rows == 4 * N + 2 * 4 * N
    else:
        assert rows > 4 * N + 2 * 4 * N, "forty answers of 3 KiB do not fit"
    assert_same([outcomes[1], outcomes[2]], alone([first, second]))


@pytest.mark.parametrize("which", [1, 2])
def test_one_who_leaves_takes_nothing_from_the_other(which: int) -> None:
    backend, jobs = Halting(), prompted(EDICT, PROMPTS[:2])
    with Bench(backend) as bench:
        bench.start_together({id_: (job, Priority.NORMAL) for id_, job in enumerate(jobs, start=1)})
        assert backend.halted.wait(PATIENCE_S)
        bench.cancel(which)
        backend.go_on.set()
        outcomes = bench.until_ended(1, 2)
        assert computed(bench) == 2 * 4 * N
    assert isinstance(outcomes[which], Cancelled)
    assert_same([outcomes[3 - which]], alone([jobs[2 - which]]))


def test_a_job_that_waits_for_rows_of_another_costs_it_nothing() -> None:
    """It is in as many passes as alone, though another's prompts are in them."""
    with Bench(toy(), max_batch_size=2) as bench:
        outcomes = bench.run(prompted(EDICT, PROMPTS[:2]))
        inverting = list(bench.passes[: 2 * N])
    assert all(sum(p.rows_by_method.values()) == 2 for p in inverting)
    assert {outcome.usage.mean_batch_size > 1 for outcome in outcomes} == {True}
    assert sum(outcome.usage.reused_evaluations for outcome in outcomes) == 4 * N


@pytest.mark.parametrize(
    "other",
    [
        replace(EDICT, source=Photo(disc(PX, (220, 40, 41)))),
        replace(EDICT, inversion=edict_options(20, 0.8, 3.5)),
        replace(EDICT, inversion=edict_options(21)),
        replace(EDICT, inversion=edict_options(20, 0.7)),
        replace(EDICT, inversion=replace(edict_options(), source_prompt="a red disc")),
        replace(EDICT, inversion=ddim_options(20, 0.8, 3.0), method=DdimEdit()),
    ],
    ids=["photo", "guidance", "steps", "strength", "prompt", "method"],
)
def test_what_differs_is_not_shared(other: EditJob) -> None:
    with Bench(toy()) as bench:
        outcomes = bench.run([EDICT, other])
        assert [outcome.usage.reused_evaluations for outcome in outcomes] == [0, 0]
    assert_same(outcomes, alone([EDICT, other]))


def test_masks_with_other_noise_share_the_inversion_alone() -> None:
    jobs = [replace(DIFFEDIT, seed=seed) for seed in (1, 2)]
    with Bench(toy()) as bench:
        outcomes = bench.run(jobs)
        assert sum(outcome.usage.reused_evaluations for outcome in outcomes) == N
    assert_same(outcomes, alone(jobs))


def test_rows_of_another_model_size_or_batch_class_are_other_rows() -> None:
    answers, row = Answers(10**6), WaitingRow(1, 0, Key("one", Denoise, (4, 8, 8), None), 2, 0, "name")
    answers.keep(row, torch.zeros(4, 8, 8))
    assert answers.get(replace(row, job=2, index=7, priority=3, due=9.0)) is not None
    assert answers.get(replace(row, name="other")) is None
    assert answers.get(replace(row, name=None)) is None
    for field, value in (("model", "two"), ("kind", Embed), ("shape", (4, 8, 9)), ("batch_class", 4)):
        assert answers.get(replace(row, key=replace(row.key, **{field: value}))) is None, field  # type: ignore[arg-type]


# --- guidance between equal prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse_bytes", [2**28, 0])
@pytest.mark.parametrize(
    ("job", "rows"),
    [
        (replace(EDICT, target_prompt="a dog", negative_prompt="a dog"), 4 * N + 2 * N),
        (replace(EDICT, target_prompt="", negative_prompt="", inversion=replace(edict_options(), source_prompt="")),
         2 * N + 2 * N),
        (replace(DDIM, target_prompt="a dog", negative_prompt="a dog"), N + N),
        (replace(edit_job("toy", PX, SdEdit(0.5, 20)), target_prompt=""), 10),
        (replace(EDICT, guidance_scale=1.0), 4 * N + 2 * N),
        (invert_job("toy", PX, replace(edict_options(), source_prompt="")), 2 * N + 2 * N),
        (replace(injection_job("toy", PX, injection(calibration=0.3)), guidance_scale=3.0), 20 + 20 + 20 + 2 * 12),
        (edit_job("toy", PX, diffedit(), Generated("", 5, PX, PX, 20)), 20 + N + 10 + 2 * N),
    ],
)  # fmt: skip
def test_guidance_between_equal_prompts_takes_one_row(job: Any, rows: int, reuse_bytes: int) -> None:
    with Bench(toy(), reuse_bytes=reuse_bytes) as bench:
        (outcome,) = bench.run([job])
        assert outcome.usage.network_evaluations == computed(bench) == rows
    wordy = _with_equal_rows(job)
    if wordy is not None:
        with Bench(OneText("toy", Settings()), reuse_bytes=reuse_bytes) as bench:
            (one,), (two,) = bench.run([job]), bench.run([wordy])
            assert one.usage.network_evaluations < two.usage.network_evaluations
            assert bits(one)[0] == bits(two)[0], "as with two rows"


class OneText(ToyBackend):
    """Reads every text as the same one."""

    def predict(self, batch: Batch) -> Sequence[Any]:
        if isinstance(batch.rows[0], Embed):
            batch = Batch([Embed("one") for _ in batch.rows], batch.size)
        return super().predict(batch)


def _with_equal_rows(job: Any) -> Any:
    """The same edit with two texts, which :class:`OneText` reads as one."""
    if isinstance(job, EditJob) and job.target_prompt == job.negative_prompt:
        return replace(job, negative_prompt="another")
    return None


# --- failures -------------------------------------------------------------------------------------------------------


class Failing(ToyBackend):
    """Fails, or answers NaN, in every pass while it is told to."""

    error: Exception | None = None
    is_nan = False

    def predict(self, batch: Batch) -> Sequence[Any]:
        if isinstance(batch.rows[0], Denoise) and self.error is not None:
            raise self.error
        answers = super().predict(batch)
        return [answer * float("nan") for answer in answers] if self.is_nan else answers


@pytest.mark.parametrize("how", ["error", "nan"])
def test_what_failed_is_not_kept(how: str) -> None:
    backend, jobs = Failing("toy", Settings()), prompted(EDICT, PROMPTS[:2])
    backend.error, backend.is_nan = (RuntimeError("it fails"), False) if how == "error" else (None, True)
    with Bench(backend) as bench:
        failed = bench.run(jobs)
        assert not any(isinstance(outcome, Edited) for outcome in failed)
        if how == "error":
            assert [type(outcome) for outcome in failed] == [Bug, Bug], "each has tried"
        backend.error, backend.is_nan = None, False
        assert_same(bench.run(jobs), alone(jobs))


def test_kept_answers_give_way_before_a_pass_is_made_smaller() -> None:
    class Full(ToyBackend):
        engine: Any = None

        def predict(self, batch: Batch) -> Sequence[Any]:
            if self.engine is not None and len(self.engine._answers) > 30:
                raise OutOfMemory("the answers take the memory")
            return super().predict(batch)

    backend = Full("toy", Settings())
    with Bench(backend) as bench:
        backend.engine = bench.engine
        outcomes = bench.run([EDICT])
        assert all(isinstance(outcome, Edited) for outcome in outcomes)
        assert {p.padding for p in bench.passes} == {0}
    assert_same(outcomes, alone([EDICT]))


# --- memory ---------------------------------------------------------------------------------------------------------


class Stacked(ToyBackend):
    """Answers with views of one tensor, as networks do."""

    def predict(self, batch: Batch) -> Sequence[Any]:
        answers = super().predict(batch)
        return torch.stack(list(answers)).unbind() if isinstance(answers[0], torch.Tensor) else answers


def held(answers: Answers) -> int:
    """Bytes of the memory that kept tensors hold, by the blocks that they are views of."""

    def tensors(value: Any) -> list[torch.Tensor]:
        if isinstance(value, Captured):
            return [value.noise_pred, *value.features.values()]
        return [value] if isinstance(value, torch.Tensor) else [value.prompt_embeds]

    found = [tensor for kept in answers._kept.values() for tensor in tensors(kept)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}.values())


@pytest.mark.parametrize("reuse_bytes", [0, 1000, 90_000, 2**28])
def test_what_is_kept_stays_within_its_bytes(reuse_bytes: int) -> None:
    jobs = every_kind_of_job("toy", PX)
    with Bench(Stacked("toy", Settings()), reuse_bytes=reuse_bytes) as bench:
        outcomes = bench.run(jobs)
        answers = bench.engine._answers
        assert held(answers) <= answers.bytes <= reuse_bytes
        assert bool(len(answers)) == (reuse_bytes > 1000)
    assert_same(outcomes, alone(jobs))


def test_those_used_last_are_kept() -> None:
    answers, key = Answers(3 * (8 + OVERHEAD)), Key("toy", Denoise, (1, 1, 1), None)

    def row(name: int) -> WaitingRow:
        return WaitingRow(1, 0, key, 2, 0, name)

    for name in range(3):
        answers.keep(row(name), torch.zeros(1, 1, 1, dtype=torch.float64))
    assert answers.get(row(0)) is not None
    answers.keep(row(3), torch.zeros(1, 1, 1, dtype=torch.float64))
    assert [answers.get(row(name)) is not None for name in range(4)] == [True, False, True, True]
    answers.keep(row(4), torch.zeros(4 * OVERHEAD, 1, 1, dtype=torch.float64))
    assert len(answers) == 3, "what is larger than all that may be kept is not"
    assert answers.bytes == 3 * (8 + OVERHEAD)
    answers.forget({(key, 0), (key, 7)})
    assert answers.bytes == len(answers) * (8 + OVERHEAD) == 2 * (8 + OVERHEAD)


def test_a_device_without_room_for_an_answer_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.Tensor, "clone", full)
    answers, key = Answers(10**6), Key("toy", Denoise, (1, 1, 1), None)
    answers.keep(WaitingRow(1, 0, key, 2, 0, "whole"), torch.zeros(1, 1, 1))
    answers.keep(WaitingRow(1, 1, key, 2, 0, "view"), torch.zeros(2, 1, 1, 1)[0])
    assert (answers.bytes, len(answers)) == (0, 0)


def test_who_changes_a_result_changes_nobody_elses() -> None:
    with Bench(toy()) as bench:
        (first,) = bench.run([EDICT])
        for array in first.inversion.arrays.values():
            array[:] = 7.0
        first.pixels[:] = 7
        assert_same(bench.run([EDICT]), alone([EDICT]))


# --- any jobs -------------------------------------------------------------------------------------------------------

POOL: list[Job] = [
    *every_kind_of_job("toy", PX, 6),
    *prompted(edit_job("toy", PX, EdictEdit(), steps=6)),
    *prompted(edit_job("toy", PX, diffedit(), steps=6), PROMPTS[:2]),
    *(replace(edit_job("toy", PX, diffedit(), steps=6), seed=seed, guidance_scale=1.0) for seed in (1, 2)),
    *prompted(edit_job("toy", PX, disentangled(6, 2), steps=6), PROMPTS[:2]),
    *prompted(edit_job("toy", PX, SdEdit(0.5, 6), Generated("a red apple", 5, PX, PX, 6)), PROMPTS[:2]),
]
EXPECTED: dict[tuple[int, bool], Any] = {}


def expected(index: int, invariant: bool) -> Any:
    """Bits of the result of a job of the pool, computed alone and without reuse."""
    if (index, invariant) not in EXPECTED:
        with Bench(toy(invariant), reuse_bytes=0) as bench:
            EXPECTED[index, invariant] = bits(bench.run([POOL[index]])[0])
    return EXPECTED[index, invariant]


Wave = list[tuple[int, Priority]]
"""Jobs of the pool that begin together, each by its index, with their priorities."""


class Waves(Bench):
    """Begins the next wave of jobs after so many passes, or when there is nothing left to do."""

    def __init__(self, waves: list[Wave], every: int, backend: ToyBackend, cap: int, reuse_bytes: int) -> None:
        super().__init__(backend, cap, reuse_bytes=reuse_bytes)
        self.indices: dict[int, int] = {}
        self._waves, self._every, self._heard, self._running = waves, every, 0, 0
        self._next()

    def hear(self, report: Report) -> None:
        super().hear(report)
        self._heard += isinstance(report, Passed)
        self._running -= isinstance(report, Ended)
        if self._waves and (self._running == 0 or (isinstance(report, Passed) and self._heard % self._every == 0)):
            self._next()

    def _next(self) -> None:
        wave, self._waves = self._waves[0], self._waves[1:]
        jobs = dict(enumerate(wave, start=len(self.indices)))
        self.indices |= {id_: index for id_, (index, _) in jobs.items()}
        self._running += len(wave)
        self.start_together({id_: (POOL[index], priority) for id_, (index, priority) in jobs.items()})


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    waves=st.lists(
        st.lists(st.tuples(st.integers(0, len(POOL) - 1), st.sampled_from(Priority)), min_size=1, max_size=6),
        min_size=1,
        max_size=3,
    ),
    every=st.integers(1, 12),
    invariant=st.booleans(),
    cap=st.sampled_from([4, 16]),
    reuse_bytes=st.sampled_from([4000, 90_000, 2**28]),
)
def test_whatever_runs_beside_and_before_every_result_has_the_same_bits(
    waves: list[Wave], every: int, invariant: bool, cap: int, reuse_bytes: int
) -> None:
    with Waves(waves, every, toy(invariant), cap, reuse_bytes) as bench:
        outcomes = bench.until_ended(*range(sum(len(wave) for wave in waves)))
        spent = sum(o.usage.network_evaluations - o.usage.reused_evaluations for o in outcomes.values())
        assert spent == computed(bench)
    for id_, index in bench.indices.items():
        assert bits(outcomes[id_]) == expected(index, invariant), POOL[index]


def test_passes_are_reported_before_what_they_saved() -> None:
    with Bench(toy()) as bench:
        bench.run(prompted(EDICT, PROMPTS[:2]))
        kinds = {r.kind for r in bench.reports if isinstance(r, Reused)}
    assert kinds == {"denoise", "encode", "embed"}
    assert any(isinstance(r, Passed) for r in bench.reports)
