"""The pixel-space family against diffusers, and what its methods promise."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from support import checkpoints
from support.checkpoints import DDPM_PX
from support.engine import Bench
from support.jobs import ddim_options, disc, edict_options, edit_job, injection, injection_job, invert_job
from underpaint_server.backends import load
from underpaint_server.backends.protocol import Backend
from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.errors import NonFiniteLatents
from underpaint_server.jobs import EditJob, Generated, InversionOptions, InvertJob, Job, Photo, Stored
from underpaint_server.methods.ddim.options import DdimEdit
from underpaint_server.methods.edict.options import EdictEdit
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.plans import total_rows
from underpaint_server.rows import Batch, Decode
from underpaint_server.settings import Settings

STEPS = 10


@pytest.fixture(scope="module", params=["epsilon", "v_prediction", "sample"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build_ddpm(tmp_path_factory.mktemp("ddpm") / request.param, prediction_type=request.param)


@pytest.fixture(scope="module")
def backend(directory: Path) -> Backend:
    return load(str(directory), "faces", Settings())


def silent(options: InversionOptions) -> InversionOptions:
    return replace(options, guidance_scale=1.0, source_prompt="")


def test_a_drawn_picture_is_the_one_diffusers_draws(directory: Path, backend: Backend) -> None:
    unet = UNet2DModel.from_pretrained(directory / "unet")
    scheduler = DDIMScheduler.from_pretrained(directory / "scheduler")
    assert scheduler.config.clip_sample
    scheduler.set_timesteps(STEPS)
    x = standard_normal((3, DDPM_PX, DDPM_PX), seed=5, purpose="start")[None].float()
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            x = scheduler.step(unet(x, timestep).sample, timestep, x, use_clipped_model_output=True).prev_sample
    theirs = ((x[0].permute(1, 2, 0).numpy() + 1) * 127.5).round().clip(0, 255)
    with Bench(backend) as bench:
        source = Generated("", 5, DDPM_PX, DDPM_PX, STEPS)
        (ours,) = bench.run([EditJob("faces", source, ddim_options(STEPS, 1.0), DdimEdit(), "", "", 1.0, 1)])
    assert np.abs(ours.pixels - theirs).max() <= 2


def test_what_is_no_number_is_no_picture(backend: Backend) -> None:
    """As a preview it was black."""
    with pytest.raises(NonFiniteLatents):
        backend.predict(Batch([Decode(torch.full((3, DDPM_PX, DDPM_PX), float("nan")).double())], 2))


def test_edict_is_exact_and_draws_the_picture_again(backend: Backend) -> None:
    photo, options = Photo(disc(DDPM_PX)), silent(edict_options(STEPS))
    with Bench(backend) as bench:
        (made,) = bench.run([InvertJob("faces", photo, options, verify=True)])
        assert made.inversion.reconstruction_max_abs_error <= 1e-10
        (edit,) = bench.run([EditJob("faces", Stored(made.inversion), options, EdictEdit(), "", "", 1.0, 1)])
    assert np.array_equal(edit.pixels, photo.pixels), "there is no autoencoder to lose anything"


def test_every_method_it_offers_runs_beside_the_others_and_as_planned(backend: Backend) -> None:
    drawn = Generated("", 5, DDPM_PX, DDPM_PX, STEPS)
    jobs: list[Job] = [
        invert_job("faces", DDPM_PX, silent(ddim_options(STEPS))),
        replace(edit_job("faces", DDPM_PX, SdEdit(0.5, STEPS), steps=STEPS), target_prompt="", guidance_scale=1.0),
        injection_job("faces", DDPM_PX, injection(sites=("mid", "up_0"), boosting_start=0.2), steps=STEPS),
        injection_job("faces", DDPM_PX, injection(calibration=0.5), drawn, STEPS),
    ]
    with Bench(backend) as bench:
        alone = [bench.run([job])[0] for job in jobs[1:]]
        for job, result in zip(jobs, together := bench.run(jobs), strict=True):
            assert result.usage.network_evaluations == total_rows(job)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(alone, together[1:], strict=True))


def test_injection_is_cached_with_its_content_and_changes_the_picture(backend: Backend) -> None:
    plain, mixed = (injection_job("faces", DDPM_PX, injection(weight=w), steps=STEPS) for w in (0.0, 0.9))
    with Bench(backend) as bench:
        (first,), (second,) = bench.run([plain]), bench.run([mixed])
        assert mixed.companion is not None
        content = replace(mixed.companion, source=Stored(second.companion))
        (again,) = bench.run([replace(mixed, companion=content)])
    assert not np.array_equal(first.pixels, second.pixels)
    assert np.array_equal(again.pixels, second.pixels)
    assert again.companion is None
    assert second.companion.arrays["h_mid"].shape == (STEPS, 32, 8, 8)
