"""A network whose bits depend on the size of its passes: what promises a return returns, company changes no byte."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.drifting import load_drifting
from support.engine import Bench
from support.jobs import (
    content_options,
    ddim_options,
    diffedit,
    disc,
    disentangled,
    edict_options,
    edit_job,
    injection,
    injection_job,
    invert_job,
    learn_job,
)
from underpaint_server.backends.model import ModelBackend
from underpaint_server.jobs import Companion, Descent, EditJob, Generated, Job, MaskJob, Photo, Picture, Sampler, Stored
from underpaint_server.methods.ddim.options import DdimEdit
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.settings import Settings

STEPS = 8
SAMPLERS = pytest.mark.parametrize("sampler", list(Sampler))


@pytest.fixture(scope="module")
def backend() -> ModelBackend:
    """In bfloat16, where a difference of a bit becomes visible in a few steps."""
    backend = load_drifting(Settings(dtype="bfloat16", exact_batch_class=4))
    assert backend.facts.info.batch_class == 4
    return backend


def run(backend: ModelBackend, job: Job, *others: Job) -> Any:
    """The job's result, alone or with the others beside it."""
    with Bench(backend) as bench:
        return bench.run([job, *others])[0]


def company(size: int = 64) -> list[Job]:
    """Jobs of one row and of two a pass, so that the sizes of passes vary."""
    inverted = invert_job("mini", size, ddim_options(STEPS + 2), verify=False)
    return [inverted, *(edit_job("mini", size, SdEdit(0.9, STEPS + k), seed=k) for k in range(3))]


def autoencoded(backend: ModelBackend) -> Picture:
    """The photo encoded and decoded."""
    nowhere = np.zeros((64, 64), np.uint8)
    pixels: Picture = run(backend, edit_job("mini", 64, diffedit(nowhere), steps=2)).pixels
    return pixels


@SAMPLERS
@pytest.mark.parametrize("others", [(), tuple(company())], ids=["alone", "in company"])
def test_weights_of_one_reproduce_the_photo(backend: ModelBackend, sampler: Sampler, others: Sequence[Job]) -> None:
    """The residuals are computed in wide passes, and the picture is drawn in narrow ones."""
    job = edit_job("mini", 64, disentangled(STEPS, STEPS, sampler), steps=STEPS)
    assert np.array_equal(run(backend, job, *others).pixels, autoencoded(backend))


def test_weights_of_one_reproduce_the_photo_in_float32_too() -> None:
    backend = load_drifting(Settings(dtype="float32", exact_batch_class=4))
    job = edit_job("mini", 64, disentangled(STEPS, STEPS, Sampler.PLMS), steps=STEPS)
    assert backend.facts.info.batch_class == 4
    assert np.array_equal(run(backend, job).pixels, autoencoded(backend))


@pytest.mark.parametrize("others", [(), tuple(company())], ids=["alone", "in company"])
def test_equal_prompts_have_an_empty_mask(backend: ModelBackend, others: Sequence[Job]) -> None:
    """A difference of rounding would be scaled to a whole map; its rows fill more than one pass."""
    job = replace(edit_job("mini", 64, diffedit(samples=9), steps=STEPS), target_prompt="a red circle")
    result = run(backend, job, *others)
    assert [notice.reason for notice in result.notices] == ["MASK_EMPTY"]
    assert np.array_equal(result.pixels, autoencoded(backend))


@pytest.mark.parametrize("others", [(), tuple(company())], ids=["alone", "in company"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_an_injection_of_weight_zero_is_ddim(
    backend: ModelBackend, others: Sequence[Job], guidance_scale: float
) -> None:
    job = injection_job("mini", 64, injection(weight=0.0), steps=STEPS, guidance_scale=guidance_scale)
    injected = run(backend, job, *others)
    stored = Stored(injected.inversion)
    plain = EditJob("mini", stored, stored.inversion.options, DdimEdit(), "", "", guidance_scale, 3)
    assert np.array_equal(run(backend, plain).pixels, injected.pixels)


def test_edict_comes_back_at_any_size_and_beside_any_job(backend: ModelBackend) -> None:
    made = run(backend, invert_job("mini", 64, edict_options(STEPS)), *company())
    assert made.inversion.reconstruction_max_abs_error <= 1e-10
    wide = replace(invert_job("mini", 64, edict_options(STEPS)), source=Photo(disc(64)[:48]))
    assert run(backend, wide).inversion.reconstruction_max_abs_error <= 1e-10


def test_an_edit_has_the_same_bits_alone_and_in_company(backend: ModelBackend) -> None:
    drawn = Generated("a red apple", 5, 64, 64, STEPS)
    jobs = [
        edit_job("mini", 64, SdEdit(0.9, STEPS)),
        edit_job("mini", 64, diffedit(), steps=STEPS),
        edit_job("mini", 64, disentangled(STEPS, 3, Sampler.PLMS), drawn, STEPS),
    ]
    with Bench(backend) as bench:
        together = bench.run(jobs)
        assert [_bits(one) for one in together] == [_bits(bench.run([job])[0]) for job in jobs]


def test_at_another_size_than_the_models_company_changes_no_byte(backend: ModelBackend) -> None:
    photo, small = Photo(disc(64)[:48]), Photo(disc(64, (30, 30, 200), 0.2)[:48])
    content = Companion(small, content_options(STEPS))
    jobs: list[Job] = [
        replace(edit_job("mini", 64, SdEdit(0.9, STEPS)), source=photo),
        replace(edit_job("mini", 64, disentangled(STEPS, 3), steps=STEPS), source=photo),
        replace(injection_job("mini", 64, injection(), steps=STEPS), source=photo, companion=content),
        edit_job("mini", 64, DdimEdit(), Generated("a red apple", 5, 64, 48, STEPS), steps=STEPS),
    ]
    with Bench(backend) as bench:
        together = bench.run(jobs)
        assert [_bits(one) for one in together] == [_bits(bench.run([job])[0]) for job in jobs]


def test_an_edit_from_a_stored_inversion_is_the_edit_that_made_it(backend: ModelBackend) -> None:
    job = edit_job("mini", 64, DdimEdit(), steps=STEPS)
    first = run(backend, job, *company())
    assert first.inversion.batch_class == 4
    again = run(backend, replace(job, source=Stored(first.inversion)))
    assert np.array_equal(first.pixels, again.pixels)


def test_a_mask_of_a_stored_inversion_has_the_batch_class_that_an_edit_of_it_has(backend: ModelBackend) -> None:
    """That of the server that made it, which may have been started with another one."""
    other = load_drifting(Settings(dtype="bfloat16", exact_batch_class=2))
    made = run(other, invert_job("mini", 64, ddim_options(STEPS))).inversion
    assert made.batch_class == 2
    job = MaskJob("mini", Photo(disc(64)), made.options, diffedit(), "a green circle", "", 5.0, 3)
    there = run(other, job)
    assert not np.array_equal(run(backend, job).difference, there.difference)
    assert np.array_equal(run(backend, replace(job, source=Stored(made))).difference, there.difference)


def test_two_learners_learn_what_each_learns_alone(backend: ModelBackend) -> None:
    """Their pull-backs would share passes too."""
    jobs = [learn_job("mini", 64, 2, photo=photo, method=Descent(1, 0.05)) for photo in (False, True)]
    with Bench(backend) as bench:
        together = bench.run(jobs)
        assert [bench.run([job])[0].state for job in jobs] == [result.state for result in together]


def _bits(result: Any) -> list[bytes]:
    """All numbers of a result."""
    arrays = [getattr(result, name, None) for name in ("pixels", "mask", "difference")]
    for inversion in (getattr(result, name, None) for name in ("inversion", "companion")):
        arrays += inversion.arrays.values() if inversion is not None else ()
    return [array.tobytes() for array in arrays if array is not None] + [repr(getattr(result, "state", None)).encode()]
