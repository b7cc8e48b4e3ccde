"""Which schedulers are understood, and how their configurations are read: as diffusers reads them, or not at all."""

import contextlib
import inspect
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from support import checkpoints
from support.engine import Bench
from support.jobs import ddim_options
from underpaint_server.backends import load
from underpaint_server.backends.protocol import Backend
from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.diffusion.schedule import Spacing
from underpaint_server.errors import ModelNotReady
from underpaint_server.jobs import EditJob, Generated
from underpaint_server.methods.ddim.options import DdimEdit
from underpaint_server.models import schedules
from underpaint_server.rows import Denoise
from underpaint_server.settings import Settings

PINNED = Settings(exact_batching="pinned")
DDIM = {"_class_name": "DDIMScheduler"}
OTHER_KINDS = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler") and name not in schedules.CLASSES and not name.startswith("Flax")
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build(tmp_path_factory.mktemp("sd") / "one")


def copied(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


INSTALLED = [
    name
    for name in sorted(schedules.CLASSES)  # without those that stand for a package that is not installed
    if "num_train_timesteps" in inspect.signature(getattr(diffusers, name)).parameters
]


@pytest.mark.parametrize("name", INSTALLED)
def test_absent_fields_have_the_defaults_of_the_schedulers_own_class(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name)).parameters
    defaults = {key: parameters[key].default for key in parameters}
    reading = schedules.read({"_class_name": name}, latent=False)
    given = schedules.read({"_class_name": name} | {k: v for k, v in defaults.items() if k in FIELDS}, latent=False)
    assert reading.schedule == given.schedule
    assert reading.clip == (1.0 if defaults.get("clip_sample") else None)
    assert reading.schedule.set_alpha_to_one is defaults.get("set_alpha_to_one", True)


FIELDS = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "timestep_spacing", "steps_offset",
    "set_alpha_to_one",
}  # fmt: skip


def test_flow_matching_edm_consistency_and_score_sde_are_among_the_other_kinds() -> None:
    assert {
        "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "LCMScheduler",
        "CMStochasticIterativeScheduler", "ScoreSdeVeScheduler", "TCDScheduler", "IPNDMScheduler",
    } <= set(OTHER_KINDS)  # fmt: skip


@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.parametrize("name", [*OTHER_KINDS, "MyScheduler"])
def test_a_scheduler_of_another_kind_is_refused_by_its_name(name: str, latent: bool) -> None:
    for config, named in (({"_class_name": name}, None), ({"_class_name": name}, "DDIMScheduler"), (DDIM, name)):
        with pytest.raises(ModelNotReady, match=f"is of class {name}, which is not supported"):
            schedules.read(config, named, latent=latent)


@pytest.mark.parametrize("build", [checkpoints.build, checkpoints.build_ddpm])
def test_a_checkpoint_of_another_kind_is_not_ready(build: object, tmp_path: Path) -> None:
    copy = checkpoints.scheduled(build(tmp_path / "model"), _class_name="FlowMatchEulerDiscreteScheduler")  # type: ignore[operator]
    with pytest.raises(ModelNotReady, match="FlowMatchEulerDiscreteScheduler, which is not supported"):
        load(str(copy), "m", PINNED)


def test_a_scheduler_without_a_name_is_refused() -> None:
    with pytest.raises(ModelNotReady, match="names no class"):
        schedules.read({"beta_schedule": "linear"}, latent=True)


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"use_flow_sigmas": True, "_class_name": "UniPCMultistepScheduler"}, "use_flow_sigmas is True.*flow matching"),
        ({"timestep_type": "continuous", "_class_name": "EulerDiscreteScheduler"}, "timestep_type.*continuous"),
        ({"prediction_type": "flow_prediction"}, "'flow_prediction' is not supported"),
        ({"use_dynamic_shifting": True, "_class_name": "UniPCMultistepScheduler"}, "flow matching"),
        ({"thresholding": True}, "thresholding is True"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr is 'yes'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr.*cannot be inverted"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"timestep_spacing": "karras"}, "karras"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps is '1000'"),
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1"),
        ({"num_train_timesteps": 1e3}, "num_train_timesteps is 1000.0"),
        ({"beta_start": None}, "beta_start is None"),
        ({"beta_start": -0.1}, "beta_start is -0.1"),
        ({"beta_end": 5.0}, "beta_end is 5.0"),
        ({"beta_end": float("nan")}, "beta_end is nan"),
        ({"beta_schedule": ["linear"]}, r"beta_schedule is \['linear'\]"),
        ({"prediction_type": 5}, "prediction_type is 5"),
        ({"steps_offset": "one"}, "steps_offset is 'one'"),
        ({"steps_offset": 7}, "steps_offset is 7"),
        ({"set_alpha_to_one": "no"}, "set_alpha_to_one is 'no'"),
        ({"clip_sample": "yes"}, "clip_sample is 'yes'"),
        ({"clip_sample": True, "clip_sample_range": 0}, "clip_sample_range is 0"),
        ({"trained_betas": 0.5}, "trained_betas is 0.5"),
        ({"trained_betas": ["a"]}, "trained_betas"),
        ({"trained_betas": []}, "betas must give at least one"),
        ({"trained_betas": [0.5, 2.0]}, "alpha_bar must decrease"),
        ({"trained_betas": [0.5], "steps_offset": 1}, "too few levels"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_by_the_field(field: dict[str, object], says: str) -> None:
    with pytest.raises(ModelNotReady, match=says):
        schedules.read(DDIM | field, latent=False)


@pytest.mark.parametrize("value", [None, "x", -1, 0, 2.5, 1e30, float("nan"), True, [], ["a"], {}])
def test_a_value_of_any_json_type_is_read_or_refused(value: object, directory: Path) -> None:
    config = json.loads((directory / "scheduler/scheduler_config.json").read_text())
    for key in (*config, "use_flow_sigmas", "timestep_type", "use_karras_sigmas"):
        for latent in (True, False):
            with contextlib.suppress(ModelNotReady):
                reading = schedules.read(config | {key: value}, latent=latent)
                assert reading.schedule.grid(reading.schedule.max_steps)


def test_trained_betas_are_taken_as_they_are() -> None:
    schedule = schedules.read(DDIM | {"trained_betas": [0.5, 0.5]}, latent=False).schedule
    assert schedule.alphas_cumprod == (0.5, 0.25)


def test_fields_of_a_solver_that_is_not_used_are_remarked_on() -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
    (remark,) = schedules.read(config, latent=False).remarks
    assert "use_karras_sigmas is not used" in remark


OF_2022: dict[str, object] = {"_class_name": "PNDMScheduler", "steps_offset": ..., "set_alpha_to_one": ...}
"""A scheduler as published with the first version of Stable Diffusion 1."""


@pytest.mark.parametrize(
    "fields", [{"steps_offset": 0}, {"steps_offset": 0, "clip_sample": True}, {"clip_sample": ..., "steps_offset": ...}]
)
def test_old_schedulers_draw_what_the_pipeline_of_diffusers_draws(
    fields: dict[str, object], directory: Path, tmp_path: Path
) -> None:
    """It repairs them when it loads them: steps_offset 1, no clipping."""
    copy = checkpoints.scheduled(copied(directory, tmp_path), **fields)
    with pytest.warns(FutureWarning):
        pipe = StableDiffusionPipeline.from_pretrained(copy, safety_checker=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    start = standard_normal((4, 12, 12), seed=5, purpose="start")[None].float()
    theirs = pipe(
        "a red apple", num_inference_steps=10, guidance_scale=4.0, latents=start, height=48, width=48, output_type="np"
    ).images[0]
    backend = load(str(copy), "sd", PINNED)
    with Bench(backend) as bench:
        source = Generated("a red apple", 5, 48, 48, 10)
        (ours,) = bench.run([EditJob("sd", source, ddim_options(10, 1.0), DdimEdit(), "a red apple", "", 4.0, 1)])
    assert np.abs(ours.pixels / 255 - theirs).max() <= 2 / 255
    assert any("steps_offset is " in remark for remark in backend.facts.about.remarks)


def test_a_checkpoint_of_2022_is_repaired_as_diffusers_does(directory: Path, tmp_path: Path) -> None:
    copy = checkpoints.scheduled(copied(directory, tmp_path), **OF_2022)
    checkpoints.configured(copy, "unet/config.json", sample_size=32, _diffusers_version="0.6.0")
    backend = load(str(copy), "sd", PINNED)
    with pytest.warns(FutureWarning):
        pipe = StableDiffusionPipeline.from_pretrained(copy, safety_checker=None, dtype=torch.float32)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    assert (backend.facts.info.width, backend.facts.info.height) == (side, side) == (256, 256)
    assert backend.facts.schedule.steps_offset == pipe.scheduler.config.steps_offset == 1
    assert backend.facts.schedule.set_alpha_to_one is pipe.scheduler.config.set_alpha_to_one is False
    assert any("sample_size 32 is read as 64" in remark for remark in backend.facts.about.remarks)


@pytest.mark.parametrize("version", ["0.9.0", "0.42.1", None, "nightly"])
def test_a_small_size_that_a_newer_diffusers_wrote_is_meant(
    version: str | None, directory: Path, tmp_path: Path
) -> None:
    copy = copied(directory, tmp_path)
    checkpoints.configured(copy, "unet/config.json", _diffusers_version=... if version is None else version)
    assert load(str(copy), "sd", PINNED).facts.info.width == 48


def test_a_schedule_that_is_read_differently_is_another_model(directory: Path, tmp_path: Path) -> None:
    """Inversions and directions name the digest, so none is used with another grid than it was made with."""
    before = load(str(directory), "sd", PINNED).facts.info.digest
    copy = checkpoints.scheduled(copied(directory, tmp_path), steps_offset=0)
    assert load(str(copy), "sd", PINNED).facts.info.digest != before
    assert schedules.read(DDIM, latent=True).implied != schedules.read(DDIM, latent=False).implied


@pytest.mark.parametrize(("trained", "offset", "limit"), [(100, 0, 100), (100, 1, 99), (20, 0, 20)])
@pytest.mark.parametrize("spacing", Spacing)
def test_there_are_no_more_steps_than_levels(
    trained: int, offset: int, limit: int, spacing: Spacing, ddpm: Path, tmp_path: Path
) -> None:
    copy = checkpoints.scheduled(
        copied(ddpm, tmp_path), num_train_timesteps=trained, timestep_spacing=spacing.value, steps_offset=offset
    )
    facts = load(str(copy), "faces", PINNED).facts
    assert facts.info.max_steps == (limit if spacing is Spacing.LEADING else trained)
    assert facts.info.default_steps == min(50, facts.info.max_steps)
    timesteps = [level.timestep for level in facts.schedule.grid(facts.info.max_steps)[1:]]
    assert timesteps == sorted(set(timesteps))


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build_ddpm(tmp_path_factory.mktemp("ddpm") / "one")


def test_the_default_number_of_steps_is_within_the_servers_limit(ddpm: Path) -> None:
    for location in (str(ddpm), "toy:"):
        info = load(location, "m", Settings(max_steps=7, exact_batching="pinned")).facts.info
        assert info.default_steps == 7


@pytest.fixture(scope="module")
def clipping(ddpm: Path) -> Backend:
    return load(str(ddpm), "faces", PINNED)


def test_a_clipped_prediction_is_that_of_diffusers(clipping: Backend, ddpm: Path) -> None:
    """Its DDIM with ``use_clipped_model_output``: the noise prediction is derived again from the clipped image."""
    assert any("clipped to [-1, 1]" in remark for remark in clipping.facts.about.remarks)
    scheduler = DDIMScheduler.from_pretrained(ddpm / "scheduler", set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    out = 2 * torch.randn((1, 3, 16, 16), generator=torch.Generator().manual_seed(0)).double()
    x = 2 * torch.randn((1, 3, 16, 16), generator=torch.Generator().manual_seed(1)).double()
    grid = clipping.facts.schedule.grid(10)
    for i in (10, 5, 1):
        row = Denoise(x[0], grid[i].timestep, grid[i].alpha_bar, torch.zeros(0, 0))
        (ours,) = schedules.clipped(1.0, [row], x, out)
        a, b = grid[i].alpha_bar, grid[i - 1].alpha_bar
        clean = (x[0] - (1 - a) ** 0.5 * ours) / a**0.5
        assert float(clean.abs().max()) == pytest.approx(1.0)
        theirs = scheduler.step(out, grid[i].timestep, x, use_clipped_model_output=True).prev_sample[0]
        torch.testing.assert_close(b**0.5 * clean + (1 - b) ** 0.5 * ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_lies_inside_is_not_changed_by_clipping() -> None:
    x, out = torch.full((1, 3, 4, 4), 0.5).double(), torch.full((1, 3, 4, 4), 0.1).double()
    for alpha_bar in (0.5, 0.999, 1.0):
        row = Denoise(x[0], 3, alpha_bar, torch.zeros(0, 0))
        assert torch.equal(schedules.clipped(1.0, [row], x, out), out)
        assert schedules.clipped(None, [row], x, out) is out


def test_clipping_makes_another_model_of_the_same_files(ddpm: Path, tmp_path: Path, clipping: Backend) -> None:
    plain = load(str(checkpoints.scheduled(copied(ddpm, tmp_path), clip_sample=False)), "faces", PINNED)
    assert plain.facts.about.remarks == ()
    assert plain.facts.info.digest != clipping.facts.info.digest
    assert plain.facts.info.fingerprint != clipping.facts.info.fingerprint
    config = json.loads((ddpm / "scheduler/scheduler_config.json").read_text())
    assert "clip=1.0" in schedules.read(config, latent=False).implied
