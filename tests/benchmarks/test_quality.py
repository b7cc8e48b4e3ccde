"""``python -m benchmarks.quality``: the whole way, on one case of each kind; and the parts its sentences rest on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from underpaint_server.backends import load
from underpaint_server.models import tensors
from underpaint_server.rows import Batch, Decode, Encode
from underpaint_server.settings import Settings

from benchmarks import cases
from benchmarks.quality import figures, unencoded
from benchmarks.quality.__main__ import main
from benchmarks.quality.section import Section, write


def test_a_quick_run_measures_every_method(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "benchmarks.quality", "--quick", "--out", str(tmp_path))
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    content = json.loads((tmp_path / "results" / "quality.json").read_text())
    edict, diffedit, mixed, injected = (section["figures"] for section in content["sections"].values())

    trips = {m: [t["max_abs_error"] for t in edict["reconstruction"] if t["method"] == m] for m in ("EDICT", "DDIM")}
    assert len(trips["EDICT"]) == len(trips["DDIM"]) == 5
    assert max(trips["EDICT"]) <= 1e-10 < min(trips["DDIM"])

    by_method: dict[str, list[Any]] = {}
    for item in [*edict["edits"], *diffedit["edits"]]:
        by_method.setdefault(item["method"], []).append(item)
    assert {len(items) for items in by_method.values()} == {5}
    assert {item["target_mse"] for item in by_method["true target"]} == {0.0}
    assert {item["outside_mse"] for item in by_method["unedited source"]} == {0.0}
    assert all(item["success"] for item in by_method["true target"] if item["kind"] in ("background", "colour"))
    kept, changed = (np.mean([i["outside_mse"] for i in by_method[m]]) for m in ("DiffEdit, threshold 0.75", "no mask"))
    assert kept < changed
    assert all(m["iou"] > 0.7 for m in diffedit["masks"] if m["setting"] == "best possible")

    learned = {item["method"]: item["direction"] for item in mixed["edits"] if item["kind"] == "background"}
    assert learned["weight 1 everywhere"] < learned["full swap"]
    assert len(mixed["losses"]) == 5
    assert all(min(losses) < losses[0] for losses in mixed["losses"].values())
    assert all(len(set(weights)) == 3 for weights in mixed["directions"].values())

    for model in ("underpaint-mini", "unconditional"):
        by_setting: dict[str, list[Any]] = {}
        for item in injected["drawn"]:
            if item["model"] == model:
                by_setting.setdefault(item["setting"], []).append(item)
        assert {len(items) for items in by_setting.values()} == {5}
        assert {item["style"] for item in by_setting["the style picture itself"]} == {0.0}
        assert max(item["content"] for item in by_setting["the content picture itself"]) < 1e-12
        assert {item["inside"] for item in by_setting["slerp, 0"]} == {None}
        left, everywhere = (np.mean([i["inside"] for i in by_setting[m]]) for m in ("left half, 0.25", "slerp, 0.25"))
        assert left > everywhere

    report = (tmp_path / "quality.md").read_text()
    assert "*EDICT comes back exactly*: holds here" in report
    assert "of too few cases to be sure" in report
    assert report.count("### ") == 21
    injections = ("quality-injection-underpaint-mini", "quality-injection-unconditional")
    for sheet in ("quality-edits", "quality-diffedit", "quality-disentangled", *injections):
        assert f"results/{sheet}.webp" in report
        assert np.asarray(Image.open(tmp_path / "results" / f"{sheet}.webp")).std() > 30


def section(text: str, value: int) -> Section:
    return Section(title=text, about=f"About {text}.", tables=(), sheets=(), figures={"value": value})


def test_a_later_run_of_one_method_keeps_what_was_written_of_the_others(tmp_path: Path) -> None:
    order = ["first", "second"]
    write(tmp_path, "Same weights.", "second", section("Two", 1), order, quick=True)
    write(tmp_path, "Same weights.", "first", section("One", 1), order, quick=True)
    report = write(tmp_path, "Same weights.", "second", section("Two", 2), order, quick=True).read_text()
    assert 0 < report.index("## One") < report.index("## Two")
    content = json.loads((tmp_path / "results" / "quality.json").read_text())
    assert [part["figures"]["value"] for part in content["sections"].values()] == [1, 2]
    (tmp_path / "results" / "quality.json").write_text('{"machine": {}, "sections": {"first": {}}}')
    assert "## One" not in write(tmp_path, "Same weights.", "second", section("Two", 2), order, quick=True).read_text()
    assert "## One" not in write(tmp_path, "Other weights.", "second", section("Two", 3), order, quick=True).read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("clip",), "no method 'clip'; choose from edict, diffedit, disentangled, injection"),
        (("--model", "/nowhere"), "no model_index.json in"),
        (("--models", "one=/nowhere"), "no model_index.json in"),
        (("--models", "/nowhere"), "is not ID=DIR,ID=DIR"),
        (("--models", "unconditional=/nowhere"), "is not ID=DIR,ID=DIR"),
    ],
)
def test_what_cannot_be_judged_is_said_at_once(
    words: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quality", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_claim_needs_two_standard_errors() -> None:
    assert "holds here (paired difference +1.000 ± 0.000" in figures.claim("it", [1.0] * 30)
    assert "holds here, of too few cases to be sure (paired" in figures.claim("it", [1.0] * 29)
    assert "does NOT hold here" in figures.claim("it", [-1.0, -1.1, -0.9])
    assert "is not seen here" in figures.claim("it", [1.0, -1.0, 1.0])


def test_spreads() -> None:
    assert figures.quartiles([1, 2, 3, 4, 5]) == "3.00 [2.00, 4.00]"
    assert figures.mean_error([1.0, 3.0]) == "2.00 ± 1.00"
    assert figures.mean_error([1.0]) == "1.00"
    assert figures.share([False] * 12) == "0.00 ± 0.07"


def test_without_encoding_an_empty_mask_keeps_the_photo_and_a_full_one_does_not() -> None:
    backend = load("toy:", "toy", Settings())
    case = cases.load(1)[0]
    region = np.zeros_like(case.region)
    settings: dict[str, Any] = {"steps": 10, "strength": 0.8, "guidance_scale": 3.0, "seed": 1}
    asked = [unencoded.edit(backend.facts, case, mask, **settings) for mask in (region, ~region)]
    found = dict(unencoded.run(backend, asked))
    photo = np.array(Image.fromarray(case.source).resize((32, 32), Image.Resampling.LANCZOS))
    (latents,) = backend.predict(Batch([Encode(tensors.image(photo))], 1))
    (kept,) = backend.predict(Batch([Decode(latents)], 1))
    assert np.array_equal(found[0], tensors.picture(kept))
    assert np.abs(found[1].astype(int) - found[0]).mean() > 5
