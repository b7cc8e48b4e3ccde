"""Reading a user's pipeline directory, and saying what is wrong with one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import checkpoints
from underpaint_server.backends import load
from underpaint_server.errors import ModelNotReady
from underpaint_server.models import checkpoint, schedules
from underpaint_server.settings import Settings


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build(tmp_path_factory.mktemp("sd") / "one")


def test_what_a_model_says_of_itself(directory: Path) -> None:
    info = load(str(directory), "mine", Settings()).facts.info
    assert (info.id, info.width, info.height, info.size_multiple) == ("mine", 48, 48, 8)
    assert (info.prompt_tokens, info.default_steps, info.dtype) == (20, 50, "float32")
    assert info.methods == ("sdedit", "ddim", "edict", "diffedit", "disentangled", "content_injection")
    assert info.feature_sites == ("mid", "up_0", "up_1")


def test_what_a_model_of_pixels_says_of_itself(tmp_path: Path) -> None:
    backend = load(str(checkpoints.build_ddpm(tmp_path / "ddpm")), "faces", Settings())
    info = backend.facts.info
    assert (info.width, info.height, info.size_multiple, info.prompt_tokens) == (16, 16, 2, 0)
    assert info.methods == ("sdedit", "ddim", "edict", "content_injection")
    assert info.feature_sites == ("mid", "up_0", "up_1")
    assert backend.facts.latent_shape(16, 16) == (3, 16, 16)
    assert backend.facts.schedule.set_alpha_to_one


def test_the_oldest_layout_is_read_too(tmp_path: Path) -> None:
    flat = checkpoints.flattened(checkpoints.build_ddpm(tmp_path / "ddpm"))
    assert load(str(flat), "faces", Settings()).facts.info.width == 16


def test_a_network_without_a_middle_has_the_other_sites(tmp_path: Path) -> None:
    directory = checkpoints.build_ddpm(tmp_path / "ddpm", mid_block_type=None)
    assert load(str(directory), "faces", Settings()).facts.info.feature_sites == ("up_0", "up_1")


def test_the_digest_names_the_contents(directory: Path, tmp_path: Path) -> None:
    same, other = (checkpoints.build(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert checkpoint.digest(same) == checkpoint.digest(directory)
    assert checkpoint.digest(other) != checkpoint.digest(directory)


@pytest.mark.parametrize(
    ("name", "size", "reads"), [("", 64, True), ("underpaint-mini", 64, True), ("underpaint-mini-ddpm", 32, False)]
)
def test_the_embedded_models_are_found(name: str, size: int, reads: bool) -> None:
    info = load(name, "mini", Settings()).facts.info
    assert (info.width, info.height, info.prompt_tokens > 0) == (size, size, reads)
    assert ("content_injection" in info.methods, "diffedit" in info.methods) == (True, reads)


def bad(directory: Path, **scheduler: object) -> Path:
    file = directory / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
    return directory


def resized(directory: Path, size: object) -> Path:
    file = directory / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": size}))
    return directory


def renamed(directory: Path, pipeline: str | None) -> Path:
    file = directory / "model_index.json"
    index = json.loads(file.read_text())
    del index["_class_name"]
    file.write_text(json.dumps(index | ({} if pipeline is None else {"_class_name": pipeline})))
    return directory


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d, t: t / "nowhere", "--allow-network"),
        (lambda d, t: checkpoints.without(d, "model_index.json"), "model_index.json"),
        (lambda d, t: checkpoints.without(d, "unet/*.safetensors"), "safetensors"),
        (lambda d, t: checkpoints.without(d, "vae/config.json"), "cannot be read"),
        (lambda d, t: checkpoints.build(t / "inpainting", in_channels=9), "inpainting"),
        (lambda d, t: bad(checkpoints.build(t / "snr"), rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
        (lambda d, t: bad(checkpoints.build(t / "flow"), prediction_type="flow"), "prediction_type"),
        (lambda d, t: renamed(d, "FluxPipeline"), "FluxPipeline.*StableDiffusionPipeline.*DDPMPipeline"),
        (lambda d, t: renamed(d, None), "_class_name is None"),
        (lambda d, t: checkpoints.build_ddpm(t / "grey", in_channels=1, out_channels=1), "give one with 3 and 3"),
        (lambda d, t: checkpoints.build_ddpm(t / "learned", out_channels=6), "learned variances"),
        (lambda d, t: checkpoints.build_ddpm(t / "classes", num_class_embeds=4), "class label"),
        (lambda d, t: checkpoints.build_ddpm(t / "sizeless", sample_size=None), "sample_size"),
        (lambda d, t: resized(checkpoints.build_ddpm(t / "words"), "large"), "sample_size is 'large'"),
        (lambda d, t: resized(checkpoints.build_ddpm(t / "three"), [8, 8, 8]), "sample_size is"),
        (lambda d, t: checkpoints.without(checkpoints.build_ddpm(t / "x"), "scheduler/*.json"), "scheduler_config"),
        (lambda d, t: checkpoints.without(checkpoints.build_ddpm(t / "x"), "unet/*.json"), "unet' cannot be read"),
        (lambda d, t: checkpoints.without(checkpoints.build_ddpm(t / "x"), "unet/*.safetensors"), "safetensors"),
    ],
)
def test_what_cannot_be_served_says_why(
    directory: Path, tmp_path: Path, change: Callable[[Path, Path], Path], says: str
) -> None:
    copy = checkpoints.build(tmp_path / "sd")
    with pytest.raises(ModelNotReady, match=says):
        load(str(change(copy, tmp_path)), "m", Settings())


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    copy = checkpoints.without(checkpoints.build(tmp_path / "sd"), "unet/*.safetensors")
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelNotReady, match="pickles can run code"):
        checkpoint.resolve(str(copy), allow_network=False)


def test_half_precision_files_are_taken_where_there_are_no_others(tmp_path: Path) -> None:
    copy = checkpoints.build(tmp_path / "sd")
    for file in copy.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert load(str(copy), "m", Settings()).facts.info.width == 48


def test_trained_betas_are_taken_as_they_are() -> None:
    assert schedules.schedule({"trained_betas": [0.5, 0.5]}).alphas_cumprod == (0.5, 0.25)


@pytest.mark.parametrize(
    "config", [{"num_train_timesteps": 0}, {"beta_end": 5.0}, {"beta_start": -0.1}, {"trained_betas": []}]
)
def test_a_schedule_that_leads_nowhere_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ModelNotReady, match="betas"):
        schedules.schedule(config)
