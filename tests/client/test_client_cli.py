"""The command, run as a process of its own."""

import json
import os
import pty
import subprocess
import sys

import grpc
import pytest
from google.rpc import error_details_pb2
from PIL import Image


@pytest.fixture
def run(server, tmp_path, photo):
    (tmp_path / "photo.png").write_bytes(photo)

    def command(*arguments, target=server.target, **environment):
        return subprocess.run(
            [sys.executable, "-m", "underpaint", *arguments],
            cwd=tmp_path,
            env={**os.environ, "UNDERPAINT_TARGET": target, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return command


def test_edit_writes_the_picture_and_says_how_to_go_on(run, server, tmp_path):
    flags = "--source-prompt before --method diffedit --seed 3 --steps 8 --strength 0.5 --guidance-scale 4 --fit pad"
    done = run("edit", "photo.png", "after", *flags.split(), "-o", "out.webp", "--mask-out", "mask.png")
    assert (done.returncode, done.stderr) == (0, "")
    with Image.open(tmp_path / "out.webp") as picture, Image.open(tmp_path / "mask.png") as mask:
        assert (picture.format, mask.size) == ("WEBP", (8, 8))
    (request,) = server.named("Edit")
    assert request.output_media_type == "image/webp"
    assert (request.seed, request.guidance_scale, request.WhichOneof("method")) == (3, 4.0, "diffedit")
    assert (request.inversion_parameters.steps, request.inversion_parameters.strength) == (8, 0.5)
    assert "seed       3" in done.stdout
    assert "inversion  inversions/" in done.stdout
    assert "MASK_FULL" in done.stdout


def test_content_injection_takes_its_flags_and_no_prompt(run, server, tmp_path, photo):
    (tmp_path / "content.png").write_bytes(photo)
    flags = (
        "--weight 0.4 --sites mid --sites up_1 --every 2 --interpolation lerp --region content.png --content-fit pad"
    )
    words = ("edit", "photo.png", "--method", "content_injection", "--content", "content.png")
    done = run(*words, *flags.split())
    assert (done.returncode, done.stderr) == (0, "")
    (request,) = server.named("Edit")
    asked = request.content_injection
    assert (asked.image.content, asked.region.content, request.target_prompt) == (photo, photo, "")
    assert (list(asked.sites), asked.every) == (["mid", "up_1"], 2)
    done = run("invert", "photo.png", "--method", "ddim", "--features", "mid", "--json")
    assert done.returncode == 0
    assert list(server.named("Invert")[0].parameters.ddim.features) == ["mid"]


def test_json_can_be_fed_back(run, server):
    done = run("edit", "photo.png", "after", "--json")
    data = json.loads(done.stdout)
    assert (done.returncode, data["image"], data["seed"]) == (0, "edited.png", 1234)
    assert data["resolved"]["target_prompt"] == "after"
    assert data["usage"]["network_evaluations"] == 40
    again = run("edit", data["inversion"], "other", "--json")
    assert json.loads(again.stdout)["inversion"] == data["inversion"]


def test_invert_reports_and_exports(run, server, tmp_path):
    done = run(
        "invert", "photo.png", "--source-prompt", "a", "--verify", "--method", "edict", "-o", "latents.safetensors"
    )
    assert done.returncode == 0
    assert "41.5 dB" in done.stdout
    assert (tmp_path / "latents.safetensors").read_bytes() == server.latents
    data = json.loads(run("invert", "photo.png", "--json").stdout)
    assert data["inversion"].startswith("inversions/")
    assert data["reconstruction_psnr_db"] is None


def test_mask_generate_and_models(run, server, tmp_path):
    done = run("mask", "photo.png", "a dog", "--reference-prompt", "a cat", "--samples", "3")
    assert (done.returncode, (tmp_path / "mask.png").exists()) == (0, True)
    assert "25.0%" in done.stdout
    assert server.named("ComputeMask")[0].edit.diffedit.samples == 3
    assert run("generate", "a cat", "--seed", "1", "-o", "cat.png").returncode == 0
    assert (tmp_path / "cat.png").exists()
    table = run("models").stdout.splitlines()
    assert [line.split()[0] for line in table] == ["MODEL", "mini", "other"]
    assert json.loads(run("models", "--json").stdout)[0]["name"] == "models/mini"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["edit", "photo.png"], "target_prompt"),
        (["edit", "absent.png", "t"], "absent.png"),
        (["edit", "photo.png", "--method", "content_injection"], "--content"),
        (["edit", "photo.png", "t", "--weight", "0.4"], "--weight: not a setting of --method edict"),
        (["invert", "photo.png", "--features", "mid"], "--features: not a setting"),
        (["edit", "photo.png", "t", "--method", "magic"], "invalid choice"),
        (["edit", "photo.png", "t", "--threshold", "0.4"], "--threshold: not a setting of --method edict"),
        (["edit", "inversions/00", "t", "--steps", "4"], "leave them out"),
        (["edit", "photo.png", "t", "-o", "out.gif"], ".png"),
        (["edit", "photo.png", "t", "--mask-out", "out.gif"], ".png"),
        (["mask", "photo.png", "t", "-o", "out.gif"], ".png"),
        (["invert", "photo.png", "--convention", "current"], "--convention: not a setting"),
        ([], "COMMAND"),
    ],
)
def test_wrong_usage_is_2_and_reaches_no_server(run, server, arguments, says):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert server.requests == []


def test_a_server_error_is_1_and_says_what_to_do(run, server, refusal):
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="sdedit.strength", description="is 2, must be at most 1")
    server.script("Edit", refusal(grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID", "fields", bad))
    done = run("edit", "photo.png", "t", "--method", "sdedit", "--strength", "2")
    assert (done.returncode, done.stdout) == (1, "")
    assert "sdedit.strength: is 2, must be at most 1" in done.stderr
    server.script("Edit", refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_UNATTAINABLE", "needs 300 s"))
    assert "--timeout" in run("edit", "photo.png", "t").stderr


def test_a_server_error_as_json(run, server, refusal):
    server.script("Edit", refusal(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "there is mini", model="x"))
    done = run("edit", "photo.png", "t", "--model", "x", "--json")
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 1
    assert (error["error"], error["reason"], error["metadata"]) == ("ModelNotFound", "MODEL_NOT_FOUND", {"model": "x"})
    assert "underpaint models" in done.stderr


def test_nobody_at_home(run):
    done = run("models", "--connect-timeout", "0.3", target="127.0.0.1:1")
    assert done.returncode == 1
    assert "no server answers at 127.0.0.1:1" in done.stderr
    assert "--target" in done.stderr


def test_the_flag_wins_over_the_variable(run, server):
    assert run("models", "--target", server.target, target="127.0.0.1:1").returncode == 0


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_drawn_on_a_terminal_unless_quiet(server, tmp_path, photo, quiet):
    (tmp_path / "photo.png").write_bytes(photo)
    terminal, side = pty.openpty()
    command = [sys.executable, "-m", "underpaint", "edit", "photo.png", "t", "--target", server.target]
    process = subprocess.Popen(
        [*command, *(["--quiet"] if quiet else [])],
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=side,
    )
    stdout, _ = process.communicate(timeout=120)
    os.write(side, b"END")
    drawn = b""
    while not drawn.endswith(b"END"):
        drawn += os.read(terminal, 65536)
    os.close(side)
    os.close(terminal)
    assert process.returncode == 0
    assert b"seed" in stdout
    assert (b"denoising" in drawn) is not quiet
    assert bool(server.named("Edit")) is quiet  # who draws progress asks for it
