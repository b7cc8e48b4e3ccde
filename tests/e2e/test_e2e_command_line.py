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
    # Both are done: it is written, and then deleted.
    last = shell(toy, folder, "direction", "more-boxes", "--delete", "-o", "last.safetensors")
    assert (last.returncode, last.stdout) == (0, "deleted directions/more-boxes\n")
    assert (folder / "last.safetensors").read_bytes() == (folder / copy).read_bytes()
    gone = shell(toy, folder, *edit)
    assert (gone.returncode, "underpaint directions" in gone.stderr) == (1, True)
    begun = told(toy, folder, "learn", "a disc", "a ball", "--example", "7", "--detach")["operation"]
    assert told(toy, folder, "operation", begun, "--wait")["state"] == "done"
    assert begun in [each["operation"] for each in told(toy, folder, "operations")]
    assert shell(toy, folder, "operation", begun, "--forget").returncode == 0
    assert "OPERATION_NOT_FOUND" in shell(toy, folder, "operation", begun).stderr
    begun = told(toy, folder, "learn", "a disc", "a bowl", "--example", "7", "--detach")["operation"]
    assert shell(toy, folder, "operation", begun, "--wait", "--forget").stderr == ""  # forgotten once it is done
    assert "OPERATION_NOT_FOUND" in shell(toy, folder, "operation", begun).stderr
    settings = shell(toy, folder, "learn", "a", "b", "--example", "7", "--learning-rate", "0.1")
    assert (settings.returncode, "--method" in settings.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "form"),
    [
        (("operation", "nope"), "32 hexadecimal digits"),
        (("direction", "No Pe"), "1 to 63 characters of a-z, 0-9 and -"),
    ],
)
def test_a_name_of_another_form_is_told_the_form_that_help_tells(
    toy: LocalServer, folder: Path, words: tuple[str, ...], form: str
) -> None:
    refused, helped = shell(toy, folder, *words), shell(toy, folder, words[0], "--help")
    assert refused.returncode == 1
    assert f"{words[0]}s/{{id}}" in refused.stderr
    assert form in refused.stderr
    assert f"{words[0]}s/{{id}}" in helped.stdout
    assert form in " ".join(helped.stdout.split())


@pytest.mark.parametrize(
    ("words", "flag", "possible"),
    [
        (("edit", "apple.png", "t", "--strength", "-1"), "--strength", "(0, 1]"),
        (("edit", "apple.png", "t", "--steps", "-1"), "--steps", "1..50"),
        (("edit", "apple.png", "t", "--guidance-scale", "nan"), "--guidance-scale", "[0, 30]"),
        (("edit", "apple.png", "t", "--method", "diffedit", "--samples", "-1"), "--samples", "1..16"),
        (("edit", "apple.png", "t", "--method", "disentangled", "--switch-step", "-1"), "--switch-step", "0..20"),
        (("generate", "t", "--width", "-8"), "--width", "positive multiple of 8"),
        (("invert", "apple.png", "--strength", "0"), "--strength", "(0, 1]"),
    ],
)
def test_a_number_out_of_range_is_said_with_flag_and_range(
    toy: LocalServer, folder: Path, words: tuple[str, ...], flag: str, possible: str
) -> None:
    refused = shell(toy, folder, *words)
    assert refused.returncode == 1
    assert f"correct {flag}" in refused.stderr
    assert possible in refused.stderr


def test_a_folder_with_more_pictures_than_a_queue_holds_is_edited_whole(toy: LocalServer, folder: Path) -> None:
    """A queue has 64 places; by default eight pictures are asked at once."""
    for index in range(150):
        path = folder / "photos" / f"roll {index % 3}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        disc((index, 40, 40)).save(path)
    (folder / "photos" / "roll 0" / "000.png").write_bytes(b"no picture")
    words = ("edit", "photos", "a corgi", "--method", "sdedit", "--steps", "5", "-o", "edited")
    ended = shell(toy, folder, *words)
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[:2] == ["edited  149 of 150, in edited", "failed  1"]
    assert "photos/roll 0/000.png: the image is neither PNG, JPEG nor WebP" in ended.stderr
    results = sorted((folder / "edited").rglob("*.png"))
    assert len(results) == 149
    assert read_picture(results[0]).size == (32, 32)
    disc().save(folder / "photos" / "roll 0" / "000.png")
    again = told(toy, folder, *words)
    assert [each["image"] for each in again["edited"]] == ["edited/roll 0/000.png"]
    assert len(again["kept"]) == 149
