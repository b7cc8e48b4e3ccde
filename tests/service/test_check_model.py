"""``underpaint-server check-model``: what it says of a checkpoint that can be served, and of one that cannot."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from support import checkpoints
from underpaint_server import offline
from underpaint_server.check_model import main
from underpaint_server.offline import ball
from underpaint_server.settings import CheckSettings


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build(tmp_path_factory.mktemp("sd") / request.param, prediction_type=request.param)


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """``main`` sends this process's log lines to a stderr that ends with the test."""
    yield
    structlog.reset_defaults()


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """The command as a shell runs it."""
    line = (sys.executable, "-m", "underpaint_server", "check-model", *words)
    return subprocess.run(line, capture_output=True, text=True, check=False)


def said(out: str) -> dict[str, str]:
    """Label -> value of each line."""
    return {line[:15].strip(): line[16:] for line in out.splitlines()}


def test_a_users_checkpoint_is_described_and_proved(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(CheckSettings(directory=str(directory), max_batch_size=4)) == 0
    out, err = capsys.readouterr()
    lines = said(out)
    assert lines["family"] == f"stable-diffusion, predicts {directory.name}"
    assert lines["image"].startswith("48 x 48 px")
    assert lines["latents"] == "4 x 12 x 12, 4 px each"
    assert lines["text"].startswith("20 tokens")
    assert lines["parameters"].startswith("network ")
    assert float(lines["EDICT"].split("latent error ")[1].split(",")[0]) <= 1e-10
    assert "s at 2 rows a pass, " in lines["network row"]
    assert "passes of 8" not in lines["network row"]
    for method in ("sdedit", "ddim", "edict", "diffedit"):
        assert f"{method} " in lines["an edit"]
    assert f"--models {directory.name}={directory}" in lines["serve it with"]
    assert "the autoencoder alone has a PSNR of" in err, "random weights must be warned of"


def test_what_takes_long_is_seen_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A DDPM of 256 px takes minutes on a CPU, and stderr may be a file."""
    monkeypatch.setattr(offline, "LINE_EVERY_S", 0.0)
    directory = checkpoints.build_ddpm(tmp_path / "ddpm")
    kept = str(tmp_path / "cache")
    assert main(CheckSettings(directory=str(directory), backend="torch", max_batch_size=2, cache_dir=kept)) == 0
    lines = [line.removeprefix("underpaint-server: ") for line in capsys.readouterr().err.splitlines()]
    stages = (
        "reading the weights",
        "trying one",
        "computing the fingerprint",
        "measuring how long",
        "measuring whether",
    )
    found = [next(i for i, line in enumerate(lines) if line.startswith(stage)) for stage in stages]
    assert found == sorted(found)
    caption = "measuring whether the number of rows in a pass changes bits"
    assert f"{caption}: 640 rows" in lines
    assert any(line.startswith(f"{caption}: 624 of 640 rows after ") for line in lines)
    assert "EDICT round trip: 20 rows" in lines
    assert any(line.startswith("EDICT round trip: 19 of 20 rows after ") for line in lines)
    assert any("clipped to [-1, 1]" in line for line in lines)


def test_what_is_read_differently_or_not_used_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = checkpoints.scheduled(checkpoints.build(tmp_path / "sd"), steps_offset=0)
    checkpoints.configured(directory, "unet/config.json", sample_size=13)
    checkpoints.save_lora(directory / "pytorch_lora_weights.safetensors")
    assert main(CheckSettings(directory=str(directory), max_batch_size=2)) == 0
    out, err = capsys.readouterr()
    for remark in ("steps_offset is 0 and read as 1", "56 x 56 px is used", "is a LoRA and is not used"):
        assert remark in err
    assert said(out)["image"].startswith("56 x 56 px")


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_an_autoencoder_that_returns_no_numbers_is_refused(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every picture would be black."""
    directory = checkpoints.build(tmp_path / "sd")
    checkpoints.fill(directory / "vae/diffusion_pytorch_model.safetensors", f"{part}.conv_out.bias", float("nan"))
    assert main(CheckSettings(directory=str(directory))) == 1
    out, err = capsys.readouterr()
    assert f"MODEL_NOT_READY: the autoencoder's {part} returns NaN" in err
    assert "serve it with" not in out


def test_a_path_that_no_setting_can_name_is_not_proposed(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "mine,new"
    place.symlink_to(directory, target_is_directory=True)
    assert main(CheckSettings(directory=str(place), max_batch_size=4)) == 0
    assert "without a comma" in said(capsys.readouterr().out)["serve it with"]


def test_the_command_takes_the_servers_flags(directory: Path) -> None:
    flags = ("--backend", "torch", "--dtype", "bfloat16", "--exact-batching=pinned", "--exact-batch-class", "3")
    ended = command(str(directory), *flags)
    assert ended.returncode == 0, ended.stderr
    lines = said(ended.stdout)
    assert lines["runs in"].startswith("bfloat16 on ")
    assert lines["passes"] == "of 3 rows"
    assert "EDICT round trip" in ended.stderr, "long work must be seen to go on"


@pytest.mark.parametrize(("place", "family"), [("", "stable-diffusion"), ("toy:", "toy")])
def test_the_embedded_model_and_the_toy(place: str, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(CheckSettings(directory=place, max_batch_size=2)) == 0
    lines = said(capsys.readouterr().out)
    assert lines["family"].startswith(family)
    assert len(lines["digest"]) == 64


def truncated(directory: Path) -> Path:
    file = directory / "text_encoder/model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    return directory


def pickled(directory: Path) -> Path:
    (directory / "vae/diffusion_pytorch_model.safetensors").rename(directory / "vae/diffusion_pytorch_model.bin")
    return directory


def without_folder(directory: Path, name: str) -> Path:
    shutil.rmtree(directory / name)
    return directory


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: d / "nowhere", "--allow-network"),
        (lambda d: checkpoints.without(d, "model_index.json"), "give a diffusers pipeline directory"),
        (lambda d: checkpoints.without(d, "unet/*.safetensors"), "must hold safetensors"),
        (pickled, "pickles can run code"),
        (truncated, "incomplete metadata"),
        (lambda d: without_folder(d, "tokenizer"), "tokenizer' is missing"),
        (lambda d: without_folder(d, "text_encoder"), "text_encoder' is missing"),
        (lambda d: (d.joinpath("model_index.json").write_text("[]"), d)[1], "not a JSON object"),
        (lambda d: checkpoints.without_tensor(d, "text_encoder/model.safetensors", "final_layer_norm.bias"), "lacks"),
        (
            lambda d: checkpoints.without_tensor(d, "unet/diffusion_pytorch_model.safetensors", "conv_in.bias"),
            "lacks conv_in.bias",
        ),
        (lambda d: checkpoints.configured(d, "model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
        (
            lambda d: checkpoints.configured(d, "scheduler/scheduler_config.json", beta_schedule="squaredcos_cap_v2"),
            "squaredcos_cap_v2",
        ),
        (
            lambda d: checkpoints.configured(d, "scheduler/scheduler_config.json", prediction_type="flow"),
            "'flow' is not supported",
        ),
        (
            lambda d: checkpoints.configured(d, "scheduler/scheduler_config.json", rescale_betas_zero_snr=True),
            "cannot be inverted",
        ),
        (lambda d: checkpoints.configured(d, "unet/config.json", cross_attention_dim=64), "shape"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(
    damage: Callable[[Path], Path], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(CheckSettings(directory=str(damage(checkpoints.build(tmp_path / "sd"))))) == 1
    out, err = capsys.readouterr()
    assert "MODEL_NOT_READY: " in err
    assert says in err
    assert "cannot be served" in err
    assert "serve it with" not in out


def test_an_inpainting_network_is_refused(tmp_path: Path) -> None:
    ended = command(str(checkpoints.build(tmp_path / "inpainting", in_channels=9)))
    assert ended.returncode == 1
    assert "inpainting networks are not supported" in ended.stderr


def test_a_network_that_overflows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Overflow in half precision is the most frequent problem with weights that were made for another format."""
    directory = checkpoints.build(tmp_path / "sd")
    checkpoints.scale(directory / "unet/diffusion_pytorch_model.safetensors", "conv_out.weight", 1e30)
    assert main(CheckSettings(directory=str(directory))) == 1
    assert "MODEL_NOT_READY: the network predicts noise of up to" in capsys.readouterr().err


def test_settings_that_make_no_sense_end_with_2() -> None:
    ended = command("", "--dtype", "int8")
    assert ended.returncode == 2
    assert "dtype" in ended.stderr


def test_the_built_in_picture_is_one_to_see_something_in() -> None:
    picture = ball(96, 64)
    assert picture.shape == (64, 96, 3)
    assert picture.std() > 30
