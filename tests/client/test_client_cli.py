"""The command, run as a process of its own."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading

import grpc
import pytest
from google.rpc import error_details_pb2
from PIL import Image
from support.waiting import PATIENCE_S


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
    assert (data["usage"]["network_evaluations"], data["usage"]["reused_evaluations"]) == (40, 16)
    assert "40 network evaluations (16 shared), mean batch 1.5" in run("edit", "photo.png", "after").stdout
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
        (["edit", "photo.png"], 'underpaint edit photo.png "a green apple"'),
        (["edit", "photo.png", "t", "-o", "nodir/out.png"], "-o: the folder of nodir/out.png does not exist"),
        (["edit", "photo.png", "t", "-o", "photo.png/out.png"], "-o: the folder of photo.png/out.png does not exist"),
        (["edit", "photo.png", "t", "-o", "folder.png"], "-o: folder.png is a folder"),
        (["edit", "photo.png", "t", "-o", f"{'long' * 100}.png"], "File name too long"),
        (["edit", "photo.png", "t", "-o", "/proc/out.png"], "-o: /proc/out.png cannot be written"),
        (
            ["edit", "photo.png", "t", "--method", "diffedit", "--mask-out", "nodir/mask.png"],
            "--mask-out: the folder of",
        ),
        (["edit", "photo.png", "t", "--method", "diffedit", "--mask-out", "./edited.png"], "--mask-out: edited.png is"),
        (["edit", "photo.png", "t", "--mask-out", "mask.png"], "--mask-out: --method edict computes no mask"),
        (["mask", "photo.png", "t", "-o", "nodir/mask.png"], "-o: the folder of nodir/mask.png does not exist"),
        (["generate", "t", "-o", "nodir/out.png"], "-o: the folder of nodir/out.png does not exist"),
        (["invert", "photo.png", "-o", "nodir/latents.safetensors"], "-o: the folder of nodir/latents.safetensors"),
        (["direction", "ripe", "-o", "nodir/ripe.safetensors"], "-o: the folder of nodir/ripe.safetensors"),
        (["edit", "photo.png", "t", "--seed", "-1"], "--seed: -1 is outside 0 to 18446744073709551615"),
        (["generate", "t", "--seed", str(2**64)], "--seed: 18446744073709551616 is outside 0 to"),
        (["edit", "photo.png", "t", "--steps", "99999999999"], "--steps: 99999999999 is outside 0 to 2147483647"),
        (["mask", "photo.png", "t", "--samples", "-99999999999"], "--samples: -99999999999 is outside"),
        (["generate", "t", "--width", "99999999999"], "--width: 99999999999 is outside"),
        (["learn", "a", "b", "--example", "-5"], "--example: -5 is outside 0 to 18446744073709551615"),
        (["learn", "a", "b", "--example", str(2**64)], "--example: 18446744073709551616 is outside"),
        (["learn", "a", "b", "--example", "\N{SUPERSCRIPT TWO}"], "\N{SUPERSCRIPT TWO}: No such file"),
        (["models", "--timeout", "-1"], "--timeout: -1 is not a number of seconds above 0"),
        (["models", "--timeout", "0"], "--timeout: 0 is not a number of seconds above 0"),
        (["models", "--timeout", "nan"], "--timeout: nan is not a number of seconds above 0"),
        (["models", "--connect-timeout", "inf"], "--connect-timeout: inf is not a number of seconds above 0"),
        (["edit", "photo.png", "t", "--overwrite"], "--overwrite: only for a folder"),
        (["edit", "photo.png", "t", "--concurrency", "2"], "--concurrency: only for a folder"),
        (["edit", "folder.png", "t"], "-o: name a folder for the results"),
        (["edit", "folder.png", "t", "-o", "results"], "there is no .png, .jpg, .jpeg or .webp file in this folder"),
        (["edit", "folder.png"], 'underpaint edit folder.png "a green apple"'),
        (["invert", "folder.png"], "folder.png: Is a directory"),
        (["edit", "", "t", "-o", "results"], "source: the name of the image is empty"),
        (["edit", "folder.png", "t", "-o", ""], "-o: name a folder for the results"),
        (["edit", "photo.png", "t", "-o", ""], "-o: "),
        (["edit", "photo.png", "caf\udce9"], "'caf\\udce9' is no text in UTF-8"),
        (["edit", "caf\udce9.png", "t"], "caf\\udce9.png: No such file or directory"),
        ([], "COMMAND"),
    ],
)
def test_wrong_usage_is_2_and_reaches_no_server(run, server, tmp_path, arguments, says):
    (tmp_path / "folder.png").mkdir()
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "Errno" not in done.stderr
    assert server.requests == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "photo.png"]


def test_a_server_error_is_1_and_says_what_to_do(run, server, refusal):
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="sdedit.strength", description="is 2, must be at most 1")
    server.script("Edit", refusal(grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID", "fields", bad))
    done = run("edit", "photo.png", "t", "--method", "sdedit", "--strength", "2")
    assert (done.returncode, done.stdout) == (1, "")
    assert "sdedit.strength: is 2, must be at most 1" in done.stderr
    server.script("Edit", refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_UNATTAINABLE", "needs 300 s"))
    assert "--timeout" in run("edit", "photo.png", "t").stderr


@pytest.mark.parametrize(
    ("arguments", "path", "flag"),
    [
        (["edit", "photo.png", "t", "--strength", "-1"], "inversion_parameters.strength", "--strength"),
        (["edit", "photo.png", "t", "--steps=-1"], "inversion_parameters.steps", "--steps"),
        (["edit", "photo.png", "t", "--method", "ddim", "--inversion-guidance-scale", "nan", "--guidance-scale", "3"],
         "inversion_parameters.guidance_scale", "--inversion-guidance-scale"),
        (["edit", "photo.png", "t", "--guidance-scale", "-inf"], "guidance_scale", "--guidance-scale"),
        (["edit", "photo.png", "t", "--mixing-coefficient", "7"], "inversion_parameters.edict.mixing_coefficient",
         "--mixing-coefficient"),
        (["generate", "t", "--width", "7"], "generated.width", "--width"),
        (["invert", "photo.png", "--guidance-scale", "-3"], "parameters.guidance_scale", "--guidance-scale"),
        (["mask", "photo.png", "t", "--threshold", "-1e-3"], "edit.diffedit.threshold", "--threshold"),
        (["edit", "photo.png", "--method", "content_injection", "--content", "photo.png", "--sites", "up"],
         "content_injection.sites[0]", "--sites"),
    ],
)  # fmt: skip
def test_a_number_that_the_server_refuses_is_said_with_its_flag(run, server, refusal, arguments, path, flag):
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field=path, description="7 is outside (0, 1]")
    rpc = {"edit": "Edit", "generate": "Edit", "invert": "Invert", "mask": "ComputeMask"}[arguments[0]]
    server.script(rpc, refusal(grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID", f"{path}: 7 is outside (0, 1]", bad))
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"underpaint: {path}: 7 is outside (0, 1] (FIELD_INVALID)",
        f"  -> correct {flag}",
    ]


def test_a_field_that_no_flag_has_set_is_said_alone(run, server, refusal):
    """The picture of the command is `image.content`, and --content another picture."""
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="image.content", description="must not be empty")
    server.script("Edit", refusal(grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID", "image.content: empty", bad))
    done = run("edit", "photo.png", "--method", "content_injection", "--content", "photo.png")
    assert done.stderr == "underpaint: image.content: empty (FIELD_INVALID)\n"


@pytest.mark.parametrize("weights", ["-1,0.5,-2e-1", "-.5,-1,1"])
def test_negative_numbers_are_values_and_no_flags(run, server, weights):
    done = run("edit", "photo.png", "t", "--method", "disentangled", "--weights", weights, "--scale", "-1e-1")
    assert (done.returncode, done.stderr) == (0, "")
    (request,) = server.named("Edit")
    assert list(request.disentangled.given.values) == pytest.approx([float(part) for part in weights.split(",")])
    assert request.disentangled.scale == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["models"], 0),
        (["models", "--json"], 0),
        (["edit", "photo.png", "t", "--json"], 0),
        (["--help"], 0),
        (["edit", "--help"], 0),
        (["--version"], 0),
        (["edit"], 2),
        (["edit", "photo.png"], 2),
        (["models", "--target", "127.0.0.1:1", "--connect-timeout", "0.2"], 1),
        (["models", "--target", "127.0.0.1:1", "--connect-timeout", "0.2", "--json"], 1),
    ],
)
@pytest.mark.parametrize("closed", ["stdout", "both"])
def test_a_reader_that_has_gone_is_no_error(server, tmp_path, photo, arguments, status, closed):
    (tmp_path / "photo.png").write_bytes(photo)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "underpaint", *arguments],
        cwd=tmp_path,
        env={**os.environ, "UNDERPAINT_TARGET": server.target},
        stdout=writer,
        stderr=writer if closed == "both" else subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.returncode == status
    assert not {"Traceback", "BrokenPipe", "Exception"} & set((done.stderr or "").replace(":", " ").split())
    assert bool(done.stderr) is (status != 0 and closed == "stdout")


def test_a_report_that_cannot_be_written_is_said(server, tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "underpaint", "models", "--target", server.target]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "underpaint: the report cannot be written: No space left on device\n",
    )


def test_a_terminal_without_the_letters_of_a_prompt_gets_the_rest(run, server, tmp_path, photo):
    (tmp_path / "\N{PEACH}.png").write_bytes(photo)
    done = run("edit", "\N{PEACH}.png", "t", "-o", "\N{PEACH}-2.png", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "seed" in done.stdout


def test_a_picture_that_cannot_be_written_says_how_to_come_to_it_again(run, server, tmp_path):
    (tmp_path / "full.png").symlink_to("/dev/full")
    done = run("edit", "photo.png", "t", "-o", "full.png")
    assert (done.returncode, done.stdout) == (1, "")
    assert "full.png cannot be written: No space left on device" in done.stderr
    assert "--seed 1234" in done.stderr


def test_an_output_that_exists_stays_as_it_is_until_the_new_one_is_there(run, server, tmp_path, refusal):
    (tmp_path / "out.png").write_bytes(b"an earlier one")
    server.script("Edit", refusal(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "there is mini"))
    assert run("edit", "photo.png", "t", "-o", "out.png").returncode == 1
    assert (tmp_path / "out.png").read_bytes() == b"an earlier one"
    assert run("edit", "photo.png", "t", "-o", "out.png").returncode == 0
    assert read(tmp_path / "out.png").format == "PNG"


# --- a folder of pictures ---------------------------------------------------------------------------------------


def read(path):
    with Image.open(path) as picture:
        picture.load()
        return picture


@pytest.fixture
def photos(tmp_path, photo):
    """Pictures of three formats in a tree, and files that are none."""
    for name in ("b.png", "a.PNG", "sub/c.jpg", "sub/deeper/d.webp", "sub/deeper/e f.jpeg", ".hidden/g.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    (tmp_path / "photos" / ".h.png").write_bytes(photo)
    return tmp_path / "photos"


EDITED = ["a.PNG", "b.png", "sub/c.jpg", "sub/deeper/d.webp", "sub/deeper/e f.jpeg"]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_edited_with_its_subfolders(run, server, photos, tmp_path):
    done = run("edit", "photos", "after", "--method", "sdedit", "--seed", "3", "-o", "some/results")
    assert (done.returncode, done.stderr) == (0, "")
    assert files(tmp_path / "some" / "results") == EDITED
    formats = [read(tmp_path / "some" / "results" / name).format for name in EDITED]
    assert formats == ["PNG", "PNG", "JPEG", "WEBP", "JPEG"]
    assert len(server.named("Edit")) == 5
    assert {(each.seed, each.target_prompt, each.WhichOneof("method")) for each in server.named("Edit")} == {
        (3, "after", "sdedit")
    }
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["edited", "5"], ["skipped", "1,"]]


def test_results_that_exist_are_kept_unless_told_otherwise(run, server, photos, tmp_path):
    results = tmp_path / "results"
    (results / "sub").mkdir(parents=True)
    (results / "sub" / "c.jpg").write_bytes(b"an earlier one")
    data = json.loads(run("edit", "photos", "t", "--method", "sdedit", "-o", "results", "--json").stdout)
    assert (data["kept"], len(data["edited"])) == (["results/sub/c.jpg"], 4)
    assert (results / "sub" / "c.jpg").read_bytes() == b"an earlier one"
    again = run("edit", "photos", "t", "--method", "sdedit", "-o", "results")
    assert (again.returncode, len(server.named("Edit"))) == (0, 4)
    assert "kept" in again.stdout
    data = json.loads(run("edit", "photos", "t", "--method", "sdedit", "-o", "results", "--overwrite", "--json").stdout)
    assert (data["kept"], len(data["edited"])) == ([], 5)
    assert read(results / "sub" / "c.jpg").format == "JPEG"


def test_results_below_the_photos_are_not_edited_again(run, server, photos):
    for _ in range(2):
        done = run("edit", "photos", "t", "--method", "sdedit", "-o", "photos/results", "--overwrite")
        assert (done.returncode, done.stderr) == (0, "")
    assert files(photos / "results") == EDITED


def test_what_fails_is_said_and_the_others_are_edited(run, server, photos, tmp_path, photo, refusal):
    (photos / "b.png").write_bytes(b"no picture")
    (photos / "sub" / "c.jpg").unlink()
    (photos / "sub" / "c.jpg").symlink_to("nowhere.jpg")
    edit, wrong = server._edit, refusal(grpc.StatusCode.INVALID_ARGUMENT, "IMAGE_UNDECODABLE", "no picture")
    server._edit = lambda request, context: (edit if request.image.content == photo else wrong)(request, context)
    done = run("edit", "photos", "t", "--method", "sdedit", "-o", "results", "--json")
    assert done.returncode == 1
    data = json.loads(done.stdout)
    assert [each["source"] for each in data["edited"]] == [
        f"photos/{name}" for name in (EDITED[4], EDITED[0], EDITED[3])
    ]
    errors = {each["source"]: each["error"]["error"] for each in data["failed"]}
    assert errors == {"photos/sub/c.jpg": "FileNotFoundError", "photos/b.png": "ImageUndecodable"}
    assert "photos/b.png: no picture (IMAGE_UNDECODABLE)" in done.stderr
    assert "photos/sub/c.jpg: No such file or directory" in done.stderr
    assert files(tmp_path / "results") == ["a.PNG", "sub/deeper/d.webp", "sub/deeper/e f.jpeg"]


@pytest.mark.parametrize(
    ("code", "reason", "path"),
    [
        (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", None),
        (grpc.StatusCode.UNAUTHENTICATED, "", None),
        (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID", "sdedit.strength"),
    ],
)
def test_an_error_that_concerns_all_ends_the_run(run, server, photos, tmp_path, refusal, code, reason, path):
    bad = error_details_pb2.BadRequest()
    if path:
        bad.field_violations.add(field=path, description="2 is outside (0, 1]")
    server._edit = refusal(code, reason, "refused", *([bad] if path else []))
    words = ("edit", "photos", "t", "--method", "sdedit", "--strength", "2", "-o", "results", "--concurrency", "1")
    done = run(*words, "--json")
    data = json.loads(done.stdout)
    assert (done.returncode, len(data["failed"]), len(data["not_tried"])) == (1, 1, 4)
    assert len(server.named("Edit")) < 5
    assert ("--strength" in done.stderr) is bool(path)
    assert files(tmp_path / "results") == []


def test_a_field_of_one_picture_does_not_end_the_run(run, server, photos, refusal):
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="diffedit.mask", description="must have the size of the source")
    server.script("Edit", refusal(grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID", "wrong size", bad))
    done = run("edit", "photos", "t", "--method", "diffedit", "--mask", "photo.png", "-o", "results", "--json")
    data = json.loads(done.stdout)
    assert (done.returncode, len(data["failed"]), len(data["edited"])) == (1, 1, 4)


def test_no_server_ends_the_run_before_anything_is_made(run, photos, tmp_path):
    words = ("edit", "photos", "t", "--method", "sdedit", "-o", "results", "--connect-timeout", "0.2")
    done = run(*words, target="127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no server answers at 127.0.0.1:1" in done.stderr
    assert done.stderr.count("start a server with") == 1
    assert not (tmp_path / "results").exists()


def test_a_full_disk_ends_the_run_and_leaves_no_half_result(server, photos, tmp_path):
    command = f"ulimit -f 0; exec {sys.executable} -m underpaint edit photos t --method sdedit -o results --json"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "UNDERPAINT_TARGET": server.target},
        capture_output=True,
        text=True,
        check=False,
    )
    data = json.loads(done.stdout)
    assert (done.returncode, len(data["failed"]), data["edited"]) == (1, 1, [])
    assert "cannot be written: File too large" in done.stderr
    assert files(tmp_path / "results") == []


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("photos", "-o: photos is the folder of the pictures"),
        ("photos/../photos", "is the folder of the pictures"),
        ("photo.png", "-o: photo.png is a file, and photos is a folder of pictures"),
    ],
)
def test_where_results_of_a_folder_cannot_go(run, server, photos, output, says):
    before = files(photos)
    done = run("edit", "photos", "t", "--method", "sdedit", "-o", output)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert server.requests == []
    assert files(photos) == before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--method diffedit --mask absent.png", "absent.png: No such file or directory"),
        ("--method disentangled", "exactly one of direction, switch_step and weights"),
        ("--method content_injection --content photos", "photos: Is a directory"),
    ],
)
def test_what_all_pictures_have_in_common_is_refused_once(run, server, photos, tmp_path, flags, says):
    done = run("edit", "photos", "t", *flags.split(), "-o", "results")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert says in done.stderr
    assert server.named("Edit") == []


def test_a_pipe_among_the_pictures_is_not_waited_for(run, server, photos, tmp_path):
    os.mkfifo(tmp_path / "photos" / "a pipe.png")
    done = run("edit", "photos", "t", "--method", "sdedit", "-o", "results", "--json")
    assert done.returncode == 0, done.stderr
    assert "photos/a pipe.png" in json.loads(done.stdout)["skipped"]
    assert not (tmp_path / "results" / "a pipe.png").exists()


def test_a_folder_in_the_place_of_a_result_is_found_before_the_work(run, server, photos, tmp_path):
    (tmp_path / "results" / "b.png").mkdir(parents=True)
    done = run("edit", "photos", "t", "--method", "sdedit", "-o", "results")
    assert (done.returncode, "results/b.png is a folder" in done.stderr) == (2, True)
    assert server.named("Edit") == []


def test_an_interrupted_run_says_how_far_it_came_and_goes_on(run, server, photos, tmp_path):
    edit, begun, on = server._edit, threading.Semaphore(0), threading.Event()

    def slow(request, context):
        if len(server.named("Edit")) > 2:
            begun.release()
            on.wait(60)
        return edit(request, context)

    server._edit = slow
    words = ["edit", "photos", "t", "--method", "sdedit", "-o", "results", "--concurrency", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "underpaint", *words, "--target", server.target], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert begun.acquire(timeout=PATIENCE_S)
    while len(files(tmp_path / "results")) < 2:
        on.wait(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    on.set()
    assert (process.returncode, stderr) == (130, "")
    assert "not tried  3" in stdout
    assert len(files(tmp_path / "results")) == 2
    assert run(*words).stdout.splitlines()[:2] == [
        "edited   3 of 3, in results",
        "kept     2, which have a result already; --overwrite edits them again",
    ]
    assert files(tmp_path / "results") == EDITED


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


def on_terminal(server, folder, *words):
    """Exit status, what is printed, and what is drawn on a terminal."""
    terminal, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "underpaint", *words, "--target", server.target],
        cwd=folder,
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
    return process.returncode, stdout, drawn


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_drawn_on_a_terminal_unless_quiet(server, tmp_path, photo, quiet):
    (tmp_path / "photo.png").write_bytes(photo)
    status, stdout, drawn = on_terminal(server, tmp_path, "edit", "photo.png", "t", *(["--quiet"] if quiet else []))
    assert status == 0
    assert b"seed" in stdout
    assert (b"denoising" in drawn) is not quiet
    assert bool(server.named("Edit")) is quiet  # who draws progress asks for it


@pytest.mark.parametrize("quiet", [False, True])
def test_a_folder_is_counted_on_a_terminal_unless_quiet(server, photos, tmp_path, quiet):
    (photos / "b.png").unlink()
    (photos / "b.png").symlink_to("nowhere.png")
    words = ("edit", "photos", "t", "--method", "sdedit", "-o", "results", *(["--quiet"] if quiet else []))
    status, stdout, drawn = on_terminal(server, tmp_path, *words)
    assert status == 1
    assert b"edited   4 of 5" in stdout
    assert (b"5/5, 1 failed" in drawn) is not quiet
    assert b"photos/b.png: No such file or directory" in drawn
