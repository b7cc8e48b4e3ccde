"""A checkpoint that cannot do one edit is not ready, and what a part returns later is checked too."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.engine import Bench
from support.jobs import edict_options, edit_job, every_kind_of_job, invert_job
from transformers import CLIPTokenizer
from underpaint_server import cache
from underpaint_server.backends import load
from underpaint_server.backends.model import ModelBackend
from underpaint_server.backends.protocol import DeviceLost
from underpaint_server.errors import InternalError, ModelNotReady, NonFiniteLatents, cause_of
from underpaint_server.jobs import Job, LearnJob
from underpaint_server.methods.ddim.options import DdimEdit
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.models.stable_diffusion import StableDiffusion
from underpaint_server.rows import Batch, Decode, Embed, Encode
from underpaint_server.settings import Settings

PINNED = Settings(backend="torch", exact_batching="pinned")
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
NAN, HUGE = float("nan"), 1e38


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was tried by an earlier test is tried again."""
    monkeypatch.setattr(cache, "read", lambda settings, name: None)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build(tmp_path_factory.mktemp("sd") / "one")


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "sd"))


@pytest.mark.parametrize(
    ("file", "tensor", "value", "says"),
    [
        (TEXT, "final_layer_norm.weight", NAN, "the text encoder returns NaN"),
        (TEXT, "embeddings.token_embedding.weight", NAN, "the text encoder returns NaN"),
        (VAE, "encoder.conv_out.weight", NAN, "the autoencoder's encoder returns NaN"),
        (VAE, "decoder.conv_out.weight", NAN, "the autoencoder's decoder returns NaN"),
        (VAE, "decoder.conv_in.weight", HUGE, "the autoencoder's decoder returns NaN"),
        (UNET, "conv_out.bias", NAN, "the network returns NaN"),
        (UNET, "conv_in.weight", HUGE, "the network returns NaN"),
        (UNET, "conv_out.weight", 1e30, "the network predicts noise of up to"),
    ],
)
def test_a_part_that_returns_no_numbers_is_found_before_the_first_caller(
    copy: Path, file: str, tensor: str, value: float, says: str
) -> None:
    checkpoints.fill(copy / file, tensor, value)
    with pytest.raises(ModelNotReady, match=says):
        load(str(copy), "m", PINNED)


@pytest.mark.parametrize(("dtype", "advice"), [("float16", "--dtype bfloat16 or --dtype float32"), ("float32", "")])
def test_an_overflow_of_half_precision_names_the_dtype(dtype: str, advice: str, copy: Path) -> None:
    """What is 1e5 in the middle of the network is fine in float32 and infinite in float16."""
    checkpoints.scale(copy / UNET, "conv_in.weight", 1e6)
    settings = Settings(exact_batching="pinned", dtype=dtype)
    if not advice:
        assert load(str(copy), "m", settings).facts.info.dtype == dtype
        return
    with pytest.raises(ModelNotReady, match=f"the network returns NaN .*{dtype} may have overflowed.*{advice}"):
        load(str(copy), "m", settings)


def test_a_tokenizer_with_more_tokens_than_the_encoder_is_refused(copy: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(copy / "tokenizer")
    assert tokenizer.add_tokens(["<my-style>"]) == 1
    tokenizer.save_pretrained(copy / "tokenizer")
    with pytest.raises(ModelNotReady, match=r"tokenizer has 1570 tokens .* only 1569 \(vocab_size\)"):
        load(str(copy), "m", PINNED)


def test_a_tokenizer_that_cannot_pad_is_refused(copy: Path) -> None:
    checkpoints.configured(copy, "tokenizer/tokenizer_config.json", pad_token=None)
    with pytest.raises(ModelNotReady, match="the text encoder cannot compute a small edit") as failed:
        load(str(copy), "m", PINNED)
    assert "padding token" in cause_of(failed.value)


def cut(directory: Path, name: str) -> None:
    (directory / name).write_bytes((directory / name).read_bytes()[:5000])


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: cut(d, UNET),
        lambda d: cut(d, TEXT),
        lambda d: cut(d, "tokenizer/tokenizer.json"),
        lambda d: checkpoints.configured(d, "unet/config.json", norm_num_groups=7),
        lambda d: checkpoints.configured(d, "tokenizer/tokenizer_config.json", pad_token=None),
        lambda d: checkpoints.configured(d, "unet/config.json", transformer_layers_per_block="one"),
        lambda d: checkpoints.configured(d, "text_encoder/config.json", hidden_act="nothing"),
    ],
)
def test_the_text_of_a_librarys_exception_is_for_operators_alone(damage: Callable[[Path], object], copy: Path) -> None:
    """The message of ModelNotReady is sent to callers, and libraries name files and functions."""
    damage(copy)
    with pytest.raises(ModelNotReady) as failed:
        load(str(copy), "m", PINNED)
    cause, text = cause_of(failed.value), str(failed.value.__cause__)
    assert cause, "the log has nothing of the cause"
    assert text not in failed.value.message
    assert type(failed.value.__cause__).__name__ not in failed.value.message


def test_a_network_of_pixels_is_tried_too(tmp_path: Path) -> None:
    directory = checkpoints.build_ddpm(tmp_path / "ddpm")
    checkpoints.fill(directory / UNET, "conv_out.bias", NAN)
    with pytest.raises(ModelNotReady, match="the network returns NaN"):
        load(str(directory), "m", PINNED)


def test_quantised_weights_are_refused(copy: Path) -> None:
    """Read as floating-point numbers they are another network, which predicts nothing or anything."""
    weights = {name: tensor.mul(100).char() for name, tensor in load_file(copy / UNET).items()}
    save_file(weights, copy / UNET, metadata={"format": "pt"})
    with pytest.raises(ModelNotReady, match=r"numbers of type I8; quantised weights are not supported"):
        load(str(copy), "m", PINNED)


def test_a_device_that_is_lost_while_loading_ends_the_process(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves no other model either, so no model is to blame; the supervisor starts another process."""

    def lost(self: StableDiffusion, texts: list[str]) -> list[Any]:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(StableDiffusion, "embed", lost)
    with pytest.raises(DeviceLost, match="device-side assert"):
        load(str(directory), "m", PINNED)


def test_a_network_that_fails_only_at_its_own_size_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small edit is not all that is looked at: so is every pass that measures."""
    whole = StableDiffusion.noise_preds

    def noise_preds(self: StableDiffusion, rows: list[Any]) -> torch.Tensor:
        return whole(self, rows) * (NAN if rows[0].latents.shape[-1] > 32 else 1.0)

    monkeypatch.setattr(StableDiffusion, "noise_preds", noise_preds)
    checkpoints.configured(copy, "unet/config.json", sample_size=34)
    with pytest.raises(ModelNotReady, match="NaN or infinite numbers at its native size"):
        load(str(copy), "m", PINNED)


# --- later, while it serves -------------------------------------------------------------------------------------


@pytest.fixture
def backend(directory: Path) -> ModelBackend:
    loaded = load(str(directory), "sd", PINNED)
    assert isinstance(loaded, ModelBackend)
    return loaded


def break_(part: str) -> Callable[[StableDiffusion], None]:
    """Let a part of a loaded model return NaN, as an overflow does that only some inputs cause."""

    def change(model: StableDiffusion) -> None:
        weights = {
            "decoder": model.vae.decoder.conv_out.bias,
            "encoder": model.vae.encoder.conv_out.bias,
            "text": model.text_encoder.get_input_embeddings().weight,
        }
        weights[part].data.fill_(NAN)

    return change


@pytest.mark.parametrize(
    ("part", "says"),
    [("decoder", "autoencoder's decoder"), ("encoder", "autoencoder's encoder"), ("text", "the text encoder")],
)
def test_no_picture_is_made_of_what_is_no_number(part: str, says: str, backend: ModelBackend) -> None:
    """A black picture with status OK is what NaN becomes as bytes."""
    break_(part)(backend._model)  # type: ignore[arg-type]
    jobs: list[Job] = [
        edit_job("sd", 48, SdEdit(0.5, 3)),
        edit_job("sd", 48, DdimEdit(), steps=3),
        invert_job("sd", 48, edict_options(3), verify=True),
    ]
    with Bench(backend) as bench:
        outcomes: Sequence[Any] = bench.run(jobs)
    assert all(isinstance(outcome, InternalError) for outcome in outcomes)
    assert all(says in outcome.message for outcome in outcomes)


def test_a_picture_that_is_no_number_fails_alone(backend: ModelBackend) -> None:
    good, bad = torch.zeros(4, 12, 12).double(), torch.full((4, 12, 12), HUGE).double() * HUGE
    (image,) = backend.predict(Batch([Decode(good)], 2))
    assert image.isfinite().all()
    with pytest.raises(NonFiniteLatents, match="decoder"):
        backend.predict(Batch([Decode(good), Decode(bad)], 2))
    with pytest.raises(NonFiniteLatents, match="encoder"):
        backend.predict(Batch([Encode(torch.full((3, 48, 48), NAN))], 2))
    assert backend.predict(Batch([Embed("a cat")], 4))[0].dropped == ""


def test_latents_that_are_no_numbers_name_the_dtype_that_overflowed(directory: Path) -> None:
    backend = load(str(directory), "sd", Settings(exact_batching="pinned", dtype="float16"))
    assert isinstance(backend, ModelBackend)
    backend._model.unet.conv_out.bias.data.fill_(float("inf"))
    jobs = [job for job in every_kind_of_job("sd", 48, steps=3) if not isinstance(job, LearnJob)]  # has no CLIP
    with Bench(backend) as bench:
        outcomes: Sequence[Any] = bench.run(jobs)
    assert all(isinstance(outcome, InternalError) for outcome in outcomes)
    assert all("start the server with --dtype bfloat16" in outcome.message for outcome in outcomes)


def test_a_checkpoint_is_tried_once_and_again_after_any_change(
    copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()  # what is kept is read
    kept = PINNED.model_copy(update={"cache_dir": str(tmp_path / "kept"), "backend": "torch"})

    def is_tried(settings: Settings) -> bool:
        load(str(copy), "m", settings)
        return "trying one small edit" in capsys.readouterr().out

    assert [is_tried(kept), is_tried(kept)] == [True, False]
    (file,) = (tmp_path / "kept/tried").iterdir()
    file.write_text(file.read_text()[:-1])
    assert [is_tried(kept), is_tried(kept)] == [True, False]
    assert is_tried(kept.model_copy(update={"dtype": "bfloat16"}))
    checkpoints.scale(copy / UNET, "conv_out.weight", 0.5)
    assert is_tried(kept)
