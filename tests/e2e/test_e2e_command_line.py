"""The commands of the client's README, as a shell runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from e2e.harness import disc
from safetensors.numpy import load_file
from support.jobs import read_picture
from underpaint_server.local_server import LocalServer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a photo in it."""
    disc().save(tmp_path / "apple.png")
    return tmp_path


def shell(server: LocalServer, folder: Path, *words: str, target: str = "") -> subprocess.CompletedProcess[str]:
    """The installed command."""
    command = Path(sys.executable).with_name("underpaint")
    env = {**os.environ, "UNDERPAINT_TARGET": target or server.target}
    return subprocess.run((command, *words), cwd=folder, env=env, capture_output=True, text=True, check=False)


def told(server: LocalServer, folder: Path, *words: str) -> Any:
    """What it says with --json when all is well."""
    ended = shell(server, folder, *words, "--json")
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_models_are_listed(toy: LocalServer, folder: Path) -> None:
    ended = shell(toy, folder, "models")
    assert ended.returncode == 0, ended.stderr
    head, first, second = ended.stdout.splitlines()
    assert head.split() == ["MODEL", "STATE", "SIZE", "STEPS", "METHODS"]
    assert first.split()[:4] == ["toy", "ready", "32x32", "20"]
    assert second.split()[0] == "other"


def test_the_readme_s_edit(toy: LocalServer, folder: Path) -> None:
    words = ("edit", "apple.png", "a green apple", "--source-prompt", "a red apple", "--method", "edict")
    ended = shell(toy, folder, *words, "-o", "green.png")
    assert ended.returncode == 0, ended.stderr
    assert read_picture(folder / "green.png").size == (32, 32)
    assert "green.png" in ended.stdout
    assert "inversions/" in ended.stdout


@pytest.mark.parametrize("method", ["edict", "ddim", "sdedit", "diffedit"])
@pytest.mark.parametrize(("name", "kind"), [("out.jpg", "JPEG"), ("out.webp", "WEBP")])
def test_every_method_writes_what_the_name_says(
    toy: LocalServer, folder: Path, method: str, name: str, kind: str
) -> None:
    said = told(toy, folder, "edit", "apple.png", "a corgi", "--method", method, "--steps", "5", "-o", name)
    assert read_picture(folder / name).format == kind
    assert said["image"] == name
    assert said["usage"]["network_evaluations"] > 0


def test_content_goes_from_one_picture_into_another(toy: LocalServer, folder: Path) -> None:
    disc((30, 30, 200)).save(folder / "plum.png")
    words = ("edit", "apple.png", "--method", "content_injection", "--steps", "10", "--sites", "up_0")
    first = told(toy, folder, *words, "--content", "plum.png", "-o", "mixed.png")
    assert read_picture(folder / "mixed.png").size == (32, 32)
    assert first["usage"]["network_evaluations"] == 10 + 10 + 10 + 6
    made = told(toy, folder, "invert", "plum.png", "--method", "ddim", "--steps", "10", "--features", "up_0",
                "--strength", "1", "--guidance-scale", "1", "-o", "plum.safetensors")  # fmt: skip
    assert load_file(folder / "plum.safetensors")["h_up_0"].shape == (10, 4, 8, 8)
    assert made["inversion"] == first["resolved"]["content_injection"]["inversion"]
    again = told(toy, folder, *words, "--content", made["inversion"], "-o", "again.png")
    assert (folder / "again.png").read_bytes() == (folder / "mixed.png").read_bytes()
    assert again["usage"]["network_evaluations"] == 10 + 6


def test_a_mask_is_found_written_and_used(toy: LocalServer, folder: Path) -> None:
    found = told(toy, folder, "mask", "apple.png", "a corgi", "--samples", "3", "--seed", "1", "-o", "mask.png")
    assert 0 <= found["coverage"] <= 1
    assert read_picture(folder / "mask.png").mode == "L"
    words = ("edit", "apple.png", "a corgi", "--method", "diffedit", "--mask", "mask.png", "--mask-out", "used.png")
    told(toy, folder, *words)
    assert (folder / "used.png").read_bytes() == (folder / "mask.png").read_bytes()


def test_an_inversion_is_made_kept_and_edited_from(toy: LocalServer, folder: Path) -> None:
    made = told(toy, folder, "invert", "apple.png", "--steps", "10", "--verify", "-o", "latents.safetensors")
    assert made["reconstruction_max_abs_error"] <= 1e-10
    assert {"source", "x", "y"} == load_file(folder / "latents.safetensors").keys()
    edited = told(toy, folder, "edit", made["inversion"], "a corgi")
    assert edited["inversion"] == made["inversion"]
    assert edited["usage"]["inversion_cache_hit"]


def test_a_picture_is_drawn(toy: LocalServer, folder: Path) -> None:
    words = ("generate", "a corgi", "--width", "48", "--height", "40", "--seed", "3", "--steps", "5", "-o", "drawn.png")
    assert told(toy, folder, *words)["seed"] == 3
    assert read_picture(folder / "drawn.png").size == (48, 40)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("edit", "apple.png", "a corgi", "--strength", "2"), 1, "inversion_parameters.strength"),
        (("edit", "apple.png", "a corgi", "--model", "none"), 1, "underpaint models"),
        (("edit", "nowhere.png", "a corgi"), 2, "nowhere.png"),
        (("edit", "apple.png", "a corgi", "--threshold", "0.5"), 2, "--threshold"),
        (("edit", "apple.png", "a corgi", "-o", "out.gif"), 2, ".gif"),
        (("edit", "apple.png"), 2, "target_prompt"),
    ],
)
def test_what_goes_wrong_is_said_in_a_line(
    toy: LocalServer, folder: Path, words: tuple[str, ...], status: int, said: str
) -> None:
    ended = shell(toy, folder, *words)
    assert ended.returncode == status
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["apple.png"]


def test_no_server_is_said_and_what_to_do(toy: LocalServer, folder: Path) -> None:
    ended = shell(toy, folder, "models", "--connect-timeout", "0.2", target="127.0.0.1:1")
    assert ended.returncode == 1
    assert "underpaint-server" in ended.stderr


def test_what_is_learned_is_listed_carried_and_used(toy: LocalServer, folder: Path) -> None:
    made = told(
        toy, folder, "learn", "a disc", "a box", "--example", "apple.png", "--example", "7", "--name", "boxes",
        "--method", "gradient", "--optimization-steps", "1",
    )  # fmt: skip
    assert (made["name"], made["example_count"], len(made["weights"])) == ("directions/boxes", 2, 20)
    assert made in told(toy, folder, "directions")
    copy = told(toy, folder, "direction", "boxes", "-o", "boxes.safetensors")["file"]
    assert load_file(folder / copy)["weights"].shape == (20,)
    assert told(toy, folder, "import", copy, "--name", "more-boxes")["etag"] == made["etag"]
    edit = ("edit", "apple.png", "--method", "disentangled", "--direction", "more-boxes", "-o", "out.png")
    assert read_picture(folder / told(toy, folder, *edit)["image"]).size == (32, 32)
    assert shell(toy, folder, "direction", "more-boxes", "--delete").returncode == 0
    gone = shell(toy, folder, *edit)
    assert (gone.returncode, "underpaint directions" in gone.stderr) == (1, True)
    begun = told(toy, folder, "learn", "a disc", "a ball", "--example", "7", "--detach")["operation"]
    assert told(toy, folder, "operation", begun, "--wait")["state"] == "done"
    assert begun in [each["operation"] for each in told(toy, folder, "operations")]
    assert shell(toy, folder, "operation", begun, "--forget").returncode == 0
    assert "OPERATION_NOT_FOUND" in shell(toy, folder, "operation", begun).stderr
    settings = shell(toy, folder, "learn", "a", "b", "--example", "7", "--learning-rate", "0.1")
    assert (settings.returncode, "--method" in settings.stderr) == (2, True)
