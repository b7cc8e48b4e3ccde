"""Reading a user's pipeline directory, and saying what is wrong with one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, DDPMPipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from support import checkpoints
from support.checkpoints import configured, without
from underpaint_server.backends import load
from underpaint_server.errors import ModelNotReady
from underpaint_server.models import checkpoint
from underpaint_server.settings import Settings

PINNED = Settings(exact_batching="pinned")
"""Without the measurement of batch invariance, which takes most of the time."""


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


@pytest.mark.parametrize(
    ("name", "size", "reads"), [("", 64, True), ("underpaint-mini", 64, True), ("underpaint-mini-ddpm", 32, False)]
)
def test_the_embedded_models_are_found(name: str, size: int, reads: bool) -> None:
    info = load(name, "mini", Settings()).facts.info
    assert (info.width, info.height, info.prompt_tokens > 0) == (size, size, reads)
    assert ("content_injection" in info.methods, "diffedit" in info.methods) == (True, reads)


def dit(directory: Path) -> Path:
    """A pipeline of another family: its network is a transformer."""
    (directory / "unet").rename(directory / "transformer")
    return configured(directory, "model_index.json", _class_name="DiTPipeline")


def with_tiny_autoencoder(directory: Path, *, named: bool = True) -> Path:
    shutil.rmtree(directory / "vae")
    AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).save_pretrained(
        directory / "vae"
    )
    return configured(directory, "model_index.json", vae=["diffusers", "AutoencoderTiny"]) if named else directory


def nested(directory: Path) -> Path:
    (directory / VAE).write_text("[" * 100_000)
    return directory


def pickled(directory: Path) -> Path:
    file = directory / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    return directory


def single_file(folder: Path, name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, folder / name)
    return folder / name


def lora(folder: Path) -> Path:
    checkpoints.save_lora(folder / "style.safetensors")
    return folder / "style.safetensors"


UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d / "nowhere", "--allow-network"),
        (lambda d: without(d, "model_index.json"), "no model_index.json: give a diffusers pipeline directory"),
        (lambda d: d / "unet", "holds one UNet2DConditionModel, a part of a pipeline"),
        (lambda d: d.parent, "give the directory of a pipeline inside it, such as '.*sd'"),
        (
            lambda d: single_file(d),
            r"is a single file, .*StableDiffusionPipeline.from_single_file\('model.safetensors'\)",
        ),
        (lambda d: single_file(d, "v1.ckpt"), r"is a single file, .*from_single_file\('v1.ckpt'\)"),
        (lambda d: single_file(d, "V1.CKPT"), r"is a single file, .*from_single_file\('V1.CKPT'\)"),
        (lambda d: single_file(d / "webui", "v1.ckpt").parent, "it holds the single file v1.ckpt: convert it"),
        (lambda d: lora(d), "is a single file.*it is a LoRA"),
        (lambda d: d / "model_index.json", "is a single file, .*give a diffusers pipeline directory"),
        (dit, "_class_name is 'DiTPipeline'; give a pipeline of a supported class"),
        (lambda d: configured(d, "model_index.json", _class_name="FluxPipeline"), "FluxPipeline.*DDPMPipeline"),
        (lambda d: configured(d, "model_index.json", _class_name=...), "_class_name is None"),
        (lambda d: configured(d, "model_index.json", _class_name=["x"]), "_class_name is "),
        (
            with_tiny_autoencoder,
            "its vae is of class AutoencoderTiny, .*save the pipeline with one of class AutoencoderKL",
        ),
        (lambda d: with_tiny_autoencoder(d, named=False), "its vae is of class AutoencoderTiny"),
        (
            lambda d: configured(d, "model_index.json", unet=["diffusers", "Transformer2DModel"]),
            "its unet is of class Transformer2D",
        ),
        (lambda d: configured(d, TEXT, model_type="t5"), "its text_encoder is of class t5"),
        (
            lambda d: configured(d, "model_index.json", tokenizer=["transformers", "T5Tokenizer"]),
            "its tokenizer is of class T5Tokenizer",
        ),
        (lambda d: without(d, "unet/*.safetensors"), "must hold safetensors: it has no"),
        (pickled, "pickles can run code"),
        (lambda d: without(d, "vae/config.json"), "vae/config.json' cannot be read: No such file or directory$"),
        (nested, "vae/config.json' cannot be read: maximum recursion depth"),
        (lambda d: without(d, "scheduler/*.json"), "scheduler_config.json' cannot be read"),
        (lambda d: configured(d, UNET, block_out_channels="many"), "unet' cannot be read"),
        (lambda d: configured(d, UNET, sample_size=None), "sample_size is None"),
        (lambda d: configured(d, UNET, sample_size=[8, 8, 8]), r"sample_size is \[8, 8, 8\]"),
        (lambda d: configured(d, UNET, sample_size=-8), "sample_size is -8"),
        (lambda d: configured(d, UNET, sample_size=True), "sample_size is True"),
        (lambda d: configured(d, VAE, scaling_factor=None), "scaling_factor is None"),
        (lambda d: configured(d, VAE, scaling_factor=0), "scaling_factor is 0"),
        (lambda d: configured(d, VAE, scaling_factor="0.18"), "scaling_factor is '0.18'"),
        (lambda d: configured(d, VAE, scaling_factor=float("nan")), "scaling_factor is nan"),
        (lambda d: configured(d, VAE, shift_factor=float("inf")), "shift_factor inf"),
    ],
)
def test_what_cannot_be_served_says_why(
    directory: Path, tmp_path: Path, change: Callable[[Path], Path], says: str
) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "sd"))
    with pytest.raises(ModelNotReady, match=f"(?s){says}"):
        load(str(change(copy)), "m", PINNED)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"in_channels": 9}, "inpainting networks are not supported"),
        ({"out_channels": 8}, r"takes 4 channels and returns 8 \(out_channels\)"),
        ({"cross_attention_dim": 48}, "reads texts of width 48.* 32"),
        ({"cross_attention_dim": (32, 48)}, r"reads texts of width \[32, 48\]"),
        ({"time_cond_proj_dim": 16}, "time_cond_proj_dim is 16.*guidance scale as an input.*LCM"),
        ({"num_class_embeds": 4}, "class label"),
        ({"class_embed_type": "timestep"}, "class label"),
        ({"addition_embed_type": "text"}, "addition_embed_type"),
        ({"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'.*continuous"),
    ],
)
def test_a_network_that_needs_or_gives_something_else_is_refused(
    tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelNotReady, match=says):
        load(str(checkpoints.build(tmp_path / "sd", **fields)), "m", PINNED)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"in_channels": 1, "out_channels": 1}, "give one with 3 and 3"),
        ({"out_channels": 6}, "learned variances"),
        ({"num_class_embeds": 4}, "class label"),
        ({"sample_size": None}, "sample_size is None"),
        ({"sample_size": "large"}, "sample_size is 'large'"),
        ({"time_embedding_type": "fourier"}, "continuous"),
    ],
)
def test_a_network_of_pixels_that_is_another_is_refused(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelNotReady, match=says):
        load(str(checkpoints.build_ddpm(tmp_path / "ddpm", **fields)), "m", PINNED)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("scheduler/*.json", "scheduler_config"),
        ("unet/*.json", "unet/config.json' cannot be read"),
        ("unet/*.safetensors", "safetensors"),
    ],
)
def test_a_network_of_pixels_that_lacks_files_is_refused(tmp_path: Path, pattern: str, says: str) -> None:
    with pytest.raises(ModelNotReady, match=says):
        load(str(without(checkpoints.build_ddpm(tmp_path / "ddpm"), pattern)), "m", PINNED)


def test_a_width_of_texts_for_each_block_is_read(tmp_path: Path) -> None:
    copy = checkpoints.build(tmp_path / "sd", cross_attention_dim=(32, 32))
    assert load(str(copy), "m", PINNED).facts.info.prompt_tokens == checkpoints.TOKENS


# --- what save_pretrained writes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(directory: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(directory, safety_checker=None)


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "fp16"},
        {"variant": "bf16"},
        {"max_shard_size": "300KB"},
        {"max_shard_size": "100KB", "variant": "fp16"},
    ],
)
def test_every_form_in_which_diffusers_saves_safetensors_is_read(
    options: dict[str, str], pipeline: StableDiffusionPipeline, directory: Path, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "saved", **options)
    names = {file.name for file in (tmp_path / "saved" / "unet").iterdir()}
    assert ("diffusion_pytorch_model.safetensors" in names) is False
    saved, plain = load(str(tmp_path / "saved"), "m", PINNED), load(str(directory), "m", PINNED)
    assert saved.facts.info.fingerprint == plain.facts.info.fingerprint
    assert saved.facts.about.remarks == ()


def test_a_network_of_pixels_in_several_files_is_read(tmp_path: Path) -> None:
    plain = checkpoints.build_ddpm(tmp_path / "plain")
    DDPMPipeline.from_pretrained(plain).save_pretrained(tmp_path / "saved", variant="fp16", max_shard_size="100KB")
    assert (tmp_path / "saved/unet/diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    fingerprints = {load(str(tmp_path / name), "m", PINNED).facts.info.fingerprint for name in ("plain", "saved")}
    assert len(fingerprints) == 1


def test_weights_without_a_variant_are_taken_first(directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "sd"))
    for variant, value in (("fp16", 0.0), ("non_ema", 1.0)):
        other = copy / "unet" / f"diffusion_pytorch_model.{variant}.safetensors"
        shutil.copy(copy / WEIGHTS, other)
        checkpoints.fill(other, "conv_in.weight", value)
    before, after = (load(str(place), "m", PINNED).facts for place in (directory, copy))
    assert (after.info.fingerprint, after.info.digest) == (before.info.fingerprint, before.info.digest)
    assert after.about.remarks == ()


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: (d / "unet/diffusion_pytorch_model-00002-of-00016.safetensors").unlink(), "lacks .*-00002-of-00016"),
        (lambda d: (d / INDEX).unlink(), "no diffusion_pytorch_model.safetensors and no .*index.json"),
        (lambda d: (d / INDEX).write_text("{}"), "has no weight_map"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {"a": 1}}'), "has no weight_map"),
        (lambda d: (d / INDEX).write_text("["), "cannot be read"),
        (lambda d: save_file({"a": torch.zeros(1)}, d / WEIGHTS), "has the weights twice"),
    ],
)
def test_weights_in_several_files_that_are_incomplete_are_refused(
    change: Callable[[Path], object], says: str, shards: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "sd"))
    change(copy)
    with pytest.raises(ModelNotReady, match=says):
        load(str(copy), "m", PINNED)


@pytest.fixture(scope="module")
def shards(pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "sd"
    pipeline.save_pretrained(folder, max_shard_size="300KB")
    return folder


def test_several_variants_are_not_chosen_from(directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "sd"))
    for variant in ("fp16", "ema"):
        shutil.copy(copy / WEIGHTS, copy / "unet" / f"diffusion_pytorch_model.{variant}.safetensors")
    (copy / WEIGHTS).unlink()
    with pytest.raises(ModelNotReady, match="has the variants ema, fp16 and no"):
        load(str(copy), "m", PINNED)


# --- digest and sizes -------------------------------------------------------------------------------------------


def test_the_digest_is_that_of_the_files_that_are_used(directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "sd"))
    before = load(str(directory), "m", PINNED).facts.info.digest
    for name in ("README.txt", "safety_checker/config.json", "clip/vocab.json", "unet/old.json"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("{}")
    single_file(copy / "other_part")
    assert load(str(copy), "m", PINNED).facts.info.digest == before
    for file in ("vae/config.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"):
        configured(copy, file, a_new_field=1)
        after = load(str(copy), "m", PINNED).facts.info.digest
        assert after != before, file
        before = after
    checkpoints.scale(copy / "text_encoder" / "model.safetensors", "final_layer_norm.weight", 0.5)
    assert load(str(copy), "m", PINNED).facts.info.digest != before


def test_the_digest_of_the_embedded_model_is_that_of_all_its_files() -> None:
    assert load("", "mini", PINNED).facts.info.digest == checkpoint.digest(checkpoint.embedded(""))


@pytest.mark.parametrize("place", ["pytorch_lora_weights.safetensors", "unet/style.safetensors", "loras/a.safetensors"])
def test_a_lora_in_the_directory_changes_nothing_and_is_remarked_on(
    place: str, directory: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "sd"))
    (copy / place).parent.mkdir(exist_ok=True)
    checkpoints.save_lora(copy / place)
    before, after = (load(str(folder), "m", PINNED).facts for folder in (directory, copy))
    assert (after.info.digest, after.info.fingerprint) == (before.info.digest, before.info.fingerprint)
    (remark,) = after.about.remarks
    assert remark.startswith(f"{place} is a LoRA and is not used; fuse it: pipeline.load_lora_weights")


def test_other_weights_that_nothing_reads_are_remarked_on(directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "sd"))
    for place in ("v1-5-pruned.safetensors", "vae/anything.safetensors"):
        single_file((copy / place).parent, Path(place).name)
    (copy / "pytorch_lora_weights.bin").write_bytes(b"pickled")
    (copy / "unet/diffusion_pytorch_model.bin").write_bytes(b"the same weights, pickled")
    assert load(str(copy), "m", PINNED).facts.about.remarks == (
        "pytorch_lora_weights.bin is not used",
        "v1-5-pruned.safetensors is not used",
        "vae/anything.safetensors is not used",
    )


def test_tensors_that_the_network_does_not_have_are_remarked_on(directory: Path, tmp_path: Path) -> None:
    """A configuration that names fewer layers than the file has makes a smaller network, and nothing else is seen."""
    copy = configured(Path(shutil.copytree(directory, tmp_path / "sd")), TEXT, num_hidden_layers=1)
    (remark,) = load(str(copy), "m", PINNED).facts.about.remarks
    assert remark.startswith("text_encoder: 16 tensors are not used, such as ")


@pytest.mark.parametrize(("size", "px"), [(13, (56, 56)), (12, (48, 48)), (1, (8, 8)), ([12, 15], (64, 48))])
def test_the_models_own_size_fits_its_network(
    size: object, px: tuple[int, int], directory: Path, tmp_path: Path
) -> None:
    """What is answered at the model's own size can be asked for again."""
    copy = configured(Path(shutil.copytree(directory, tmp_path / "sd")), UNET, sample_size=size)
    facts = load(str(copy), "m", PINNED).facts
    info = facts.info
    assert (info.width, info.height) == px
    assert (info.width % info.size_multiple, info.height % info.size_multiple) == (0, 0)
    assert any("cannot halve its native size" in remark for remark in facts.about.remarks) == (size != 12)


def test_the_own_size_of_a_model_of_pixels_fits_its_network(tmp_path: Path) -> None:
    info = load(str(checkpoints.build_ddpm(tmp_path / "ddpm", sample_size=15)), "m", PINNED).facts.info
    assert (info.width, info.height, info.size_multiple) == (16, 16, 2)
