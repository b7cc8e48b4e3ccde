"""The torch backend against diffusers, and its bits against itself."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, StableDiffusionPipeline, UNet2DConditionModel
from support import checkpoints
from support.engine import Bench
from support.jobs import (
    ddim_options,
    disentangled,
    edict_options,
    edit_job,
    every_kind_of_job,
    injection,
    injection_job,
    invert_job,
    learn_job,
)
from underpaint_server.backends import load
from underpaint_server.backends.protocol import Backend
from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.jobs import Descent, EditJob, Generated, Inverted, Job, LearnJob
from underpaint_server.methods.ddim.options import DdimEdit
from underpaint_server.methods.edict.options import EdictEdit
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.rows import Batch, Denoise, Embed, PullBack
from underpaint_server.settings import Settings

Invariant = Callable[[str, int | None], bool]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build(tmp_path_factory.mktemp("sd") / request.param, prediction_type=request.param)


def test_a_generated_picture_is_the_one_diffusers_draws(directory: Path) -> None:
    """Stable Diffusion 1.x and 2.x, guidance on, the same start noise: an independent implementation agrees."""
    pipe = StableDiffusionPipeline.from_pretrained(directory, safety_checker=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    start = standard_normal((4, 12, 12), seed=5, purpose="start")
    theirs = pipe(
        "a red apple",
        num_inference_steps=20,
        guidance_scale=4.0,
        latents=start[None].float(),
        height=48,
        width=48,
        output_type="np",
    ).images[0]
    with Bench(load(str(directory), "sd", Settings())) as bench:
        source = Generated("a red apple", 5, 48, 48, 20)
        (ours,) = bench.run([EditJob("sd", source, ddim_options(20, 1.0), DdimEdit(), "a red apple", "", 4.0, 1)])
    assert np.abs(ours.pixels / 255 - theirs).max() <= 2 / 255


def test_inversion_is_the_one_of_diffusers(directory: Path) -> None:
    """The ``target`` convention, which is that of its inverse scheduler, for epsilon and for v prediction."""
    backend = load(str(directory), "sd", Settings())
    with Bench(backend) as bench:
        (made,) = bench.run([invert_job("sd", 48, ddim_options(20), verify=False)])
    trajectory = torch.from_numpy(made.inversion.arrays["trajectory"])
    (empty,) = backend.predict(Batch([Embed("")], 4))
    unet = UNet2DConditionModel.from_pretrained(directory / "unet")
    scheduler = DDIMInverseScheduler.from_pretrained(directory / "scheduler")
    scheduler.set_timesteps(20)
    latents = trajectory[0][None]
    with torch.no_grad():
        for timestep in scheduler.timesteps[: len(trajectory) - 1]:
            predicted = unet(latents.float(), timestep, empty.prompt_embeds[None]).sample
            latents = scheduler.step(predicted.double(), timestep, latents).prev_sample
    torch.testing.assert_close(latents[0], trajectory[-1], rtol=1e-4, atol=1e-4)


def test_edict_is_exact_on_checkpoints_of_every_kind(directory: Path) -> None:
    with Bench(load(str(directory), "sd", Settings())) as bench:
        for result in bench.run([invert_job("sd", 48, edict_options(20, s)) for s in (0.8, 0.75)]):
            assert result.inversion.reconstruction_max_abs_error <= 1e-10


def test_every_kind_of_job_runs_on_a_users_checkpoint(directory: Path) -> None:
    jobs = [job for job in every_kind_of_job("sd", 48, steps=5) if not isinstance(job, LearnJob)]  # has no CLIP
    with Bench(load(str(directory), "sd", Settings())) as bench:
        assert all(not isinstance(outcome, Exception) for outcome in bench.run(jobs))


@pytest.mark.parametrize("model", [pytest.param("embedded", id="float32"), "bfloat16"])
def test_edict_is_exact_on_the_embedded_model_while_others_come_and_go(
    model: str, request: pytest.FixtureRequest, is_invariant: Invariant
) -> None:
    """The promise of the product: 200 evaluations, every one of them in other company."""
    jobs = [job for job in every_kind_of_job("mini", 64, steps=6) if not isinstance(job, LearnJob)]
    backend = request.getfixturevalue(model)
    with Bench(backend) as bench:
        made, *_ = bench.run([invert_job("mini", 64, edict_options(25, 0.8)), *jobs * 2])
        met = [p for p in bench.passes if "invert_edict" in p.rows_by_method]
    info = backend.facts.info
    if is_invariant(info.dtype, info.batch_class):
        assert len({sum(p.rows_by_method.values()) for p in met}) >= 4, "the company must really have varied"
    else:
        assert {p.padding + sum(p.rows_by_method.values()) for p in met} == {info.batch_class}
        assert len({tuple(p.rows_by_method) for p in met}) >= 3, "the company must really have varied"
    assert isinstance(made, Inverted)
    assert made.inversion.reconstruction_max_abs_error == pytest.approx(0, abs=1e-10)


def test_equal_requests_give_equal_bytes_alone_and_in_company(embedded: Backend, is_invariant: Invariant) -> None:
    """One of each kind of row among them: plain, exact, injected, mixed prompts, and the pull-backs of a learner."""
    info = embedded.facts.info
    is_invariant(info.dtype, info.batch_class)
    jobs: list[Job] = [
        edit_job("mini", 64, EdictEdit(), steps=6),
        edit_job("mini", 64, SdEdit(0.7, 6)),
        injection_job("mini", 64, injection(), steps=6),
        edit_job("mini", 64, disentangled(6, 2), steps=6),
        learn_job("mini", 64, 6, method=Descent(2, 0.05)),
    ]
    with Bench(embedded) as bench:
        alone = [bench.run([job])[0] for job in jobs]
        together = bench.run([*jobs, *every_kind_of_job("mini", 64, steps=6)])[: len(jobs)]
        met = {name for p in bench.passes for name in p.rows_by_method if len(p.rows_by_method) > 1}
    assert {"edict", "sdedit", "content_injection", "disentangled", "learn"} <= met
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(alone[:-1], together[:-1], strict=True))
    assert alone[-1].state == together[-1].state


def test_pinned_jobs_are_exact_too() -> None:
    with Bench(load("", "mini", Settings(exact_batching="pinned", exact_batch_class=3))) as bench:
        (result, _) = bench.run([invert_job("mini", 64, edict_options(6)), edit_job("mini", 64, DdimEdit(), steps=3)])
        assert {p.padding + sum(p.rows_by_method.values()) for p in bench.passes} == {3}
    assert result.inversion.reconstruction_max_abs_error <= 1e-10


@pytest.mark.parametrize(("given", "largest", "size"), [(4, 16, 4), (3, 2, 2), (8, 16, 8), (8, 6, 6)])
def test_the_batch_class_is_the_one_given_within_the_largest_pass(given: int, largest: int, size: int) -> None:
    settings = Settings(exact_batching="pinned", exact_batch_class=given, max_batch_size=largest)
    info = load("", "mini", settings).facts.info
    assert (info.batch_class, info.batch_class_at(64, 96)) == (size, size)


def test_large_images_have_a_smaller_batch_class_because_they_need_more_memory(embedded: Backend) -> None:
    info = replace(embedded.facts.info, other_batch_class=8)
    sizes = [(32, 32), (64, 128), (128, 128), (64, 256), (256, 256)]
    assert [info.batch_class_at(*size) for size in sizes] == [8, 8, 4, 4, 2]
    assert embedded.batch_class(Denoise, (4, 32, 32)) == 2
    assert embedded.batch_class(PullBack, (4, 8, 16)) == 2


def test_rows_have_the_same_bits_in_every_batch(embedded: Backend, is_invariant: Invariant) -> None:
    """In batches of every size, or where the size changes bits, in all of the batch class."""
    info = embedded.facts.info
    class_ = None if is_invariant(info.dtype, info.batch_class) else info.batch_class
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    embeds = embedded.predict(Batch([Embed(t) for t in ("a red apple", "", "a blue fish", "a cat")], 4))
    rows = [
        Denoise(torch.randn((4, 16, 16), generator=generator).double(), rng.randrange(1000), 0.5, e.prompt_embeds)
        for e in [*embeds] * 4
    ]
    size = class_ or len(rows)
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    reference = {id(row): a for part in parts for row, a in zip(part, embedded.predict(Batch(part, size)), strict=True)}
    for _ in range(12):
        part = rng.sample(rows, rng.randint(1, size))
        answers = embedded.predict(Batch(part, class_ or max(2, len(part) + rng.randint(0, 2))))
        assert all(torch.equal(answer, reference[id(row)]) for row, answer in zip(part, answers, strict=True))


def test_another_function_has_another_fingerprint(embedded: Backend, bfloat16: Backend) -> None:
    again = load("", "mini", Settings())
    assert embedded.facts.info.fingerprint == again.facts.info.fingerprint != bfloat16.facts.info.fingerprint


def test_what_the_text_encoder_cannot_read_is_reported(embedded: Backend) -> None:
    long = "a red apple " * 30
    (short, cut) = embedded.predict(Batch([Embed("a red apple"), Embed(long)], 4))
    assert short.dropped == ""
    assert cut.dropped.startswith("a red apple") or cut.dropped.startswith("red") or cut.dropped.startswith("apple")


def test_what_is_dropped_is_quoted_as_the_caller_wrote_it(embedded: Backend) -> None:
    """Tokens decoded again would be in small letters, with other spaces and without what has no token."""
    long = "A  Red\tApple, ÉCOLE de peinture (très Grande), 日本 ... " * 5
    (cut,) = embedded.predict(Batch([Embed(long)], 4))
    assert cut.dropped
    assert long.rstrip().endswith(cut.dropped)
    assert len(cut.dropped) < len(long) - 20
