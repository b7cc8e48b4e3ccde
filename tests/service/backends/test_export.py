"""Exported networks in the cache directory: made once, shared, and made again when they are damaged."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support import checkpoints
from support.waiting import PATIENCE_S
from underpaint_server.backends.export import export, key
from underpaint_server.models import families
from underpaint_server.models.families import Family
from underpaint_server.models.graphs import UNET
from underpaint_server.settings import Settings


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build(tmp_path_factory.mktemp("export") / "checkpoint")


def read(directory: Path) -> Family:
    return families.load(directory, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Family:
    return read(directory)


@pytest.fixture(scope="module")
def cached(model: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    export(model, Settings(cache_dir=str(folder)), lambda _: None)
    return folder


def notes(model: Family, cache: Path) -> list[str]:
    """What is exported when the model is loaded with this cache."""
    made: list[str] = []
    export(model, Settings(cache_dir=str(cache)), made.append)
    return made


def test_every_network_is_exported_once(model: Family, cached: Path) -> None:
    assert notes(model, cached) == []
    files = {file.parent.name for file in (cached / "onnx" / key(model)).rglob("model.onnx")}
    assert files == set(model.graphs)
    assert not list(cached.rglob(".new-*"))


@pytest.mark.parametrize("damage", ["changed", "cut", "deleted", "no digest"])
def test_a_damaged_file_is_made_again(damage: str, model: Family, cached: Path) -> None:
    folder = cached / "onnx" / key(model) / "text_encoder"
    file = folder / "model.onnx"
    match damage:
        case "changed":
            file.write_bytes(b"x" + file.read_bytes()[1:])
        case "cut":
            file.write_bytes(file.read_bytes()[:-1])
        case "deleted":
            file.unlink()
        case _:
            (folder / "sha256").unlink()
    made = notes(model, cached)
    assert len(made) == 1
    assert "text encoder" in made[0]
    assert notes(model, cached) == []


def test_two_that_start_together_export_once(model: Family, directory: Path, cached: Path) -> None:
    folder = cached / "onnx" / key(model) / "text_encoder"
    (folder / "sha256").unlink()
    made: list[str] = []
    threads = [
        threading.Thread(target=export, args=(each, Settings(cache_dir=str(cached)), made.append))
        for each in (model, read(directory))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_other_weights_have_files_of_their_own(model: Family, tmp_path: Path) -> None:
    other = read(checkpoints.build(tmp_path / "other", prediction_type="v_prediction"))
    assert key(other) != key(model)


def test_the_network_is_as_before(model: Family, cached: Path) -> None:
    """The exporter's hooks are gone."""
    assert cached
    assert not any(module._forward_hooks for module in model.unet.modules())


def test_where_nothing_can_be_kept_the_files_are_temporary(
    model: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("underpaint_server.backends.export._export", _nothing)
    (tmp_path / "onnx").write_text("in the way")
    said: list[str] = []
    exported = export(model, Settings(cache_dir=str(tmp_path)), said.append)
    assert exported.file(UNET).is_file()
    assert "not kept" in said[0]


def test_files_of_a_directory_that_is_read_only_are_used(model: Family, cached: Path) -> None:
    folders = [folder for folder in cached.rglob("*") if folder.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert notes(model, cached) == []
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_the_command_makes_what_a_start_needs(directory: Path, cached: Path, tmp_path: Path) -> None:
    """As its user runs it: nothing is left for a later start to export, and what cannot be kept is said."""
    first = command("--models", f"m={directory}", "--cache-dir", str(cached), "--backend", "openvino")
    assert first.returncode == 0, first.stderr
    assert "m: loaded with openvino" in first.stderr
    assert "exporting" not in first.stderr, "another process has made them"
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    second = command("--models", f"m={directory}", "--cache-dir", str(in_the_way))
    assert second.returncode == 1
    assert "cache_dir" in second.stderr
    third = command("--models", f"m={tmp_path / 'missing'}", "--cache-dir", str(cached))
    assert third.returncode == 1
    assert "m: " in third.stderr


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "underpaint_server", "export", *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def _nothing(_graph: object, _unet: object, file: Path) -> None:
    file.write_bytes(b"")
    (file.parent / "sites.json").write_text("{}")
