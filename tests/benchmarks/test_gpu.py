"""The benchmark for a GPU: the whole script on tiny networks, and what it says when there is no time or no memory."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recorder import CpuRecorder

from benchmarks import __main__ as command
from benchmarks import gpu
from benchmarks.gpu import bare, networks
from benchmarks.gpu.clock import Budget

SMALLEST = replace(networks.TINY, steps=4, jobs=2, rows=(2,), round_s=0.0, load_s=0.2, matrix=32, minutes=60.0)
CPU = torch.device("cpu")


def test_a_run_measures_every_section(tmp_path: Path) -> None:
    report = gpu.run(quick=False, device="cpu", scale=SMALLEST)
    report.write(tmp_path, quick=False)
    figures = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    assert figures["missing"] == {}
    assert list(figures["values"]) == list(gpu.SECTIONS) == list(gpu.NEEDS_S)
    assert figures["values"]["round trip"]["error_busy"] <= 1e-10
    assert figures["values"]["round trip"]["same_bits"]
    targets = {what: measured for what, _, measured in report.tables[0].rows}
    assert len(targets) == 16
    assert not [what for what, measured in targets.items() if measured == "not measured" or "nan" in measured]
    assert "| edict |" in (tmp_path / "gpu.md").read_text()


def test_what_there_is_no_time_for_is_said() -> None:
    report = gpu.run(quick=True, device="cpu", scale=replace(SMALLEST, minutes=0.0))
    assert list(report.figures["missing"]) == list(gpu.SECTIONS)
    assert all("skipped" in why for why in report.figures["missing"].values())
    for section in gpu.SECTIONS:
        assert any(finding.startswith(f"{section}: skipped") for finding in report.findings)
    assert {measured for _, _, measured in report.tables[0].rows} == {"not measured"}


def test_a_section_that_fails_is_said_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(measured: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    kept = {"ceiling": gpu.SECTIONS["ceiling"], "passes": fails, "side stages": gpu.SECTIONS["side stages"]}
    monkeypatch.setattr(gpu, "SECTIONS", kept)
    report = gpu.run(quick=True, device="cpu", scale=SMALLEST)
    assert list(report.figures["values"]) == ["ceiling", "side stages"]
    assert "passes: failed: OutOfMemoryError: out of memory." in report.findings


def test_all_sections_fit_into_nine_minutes() -> None:
    assert networks.FULL.minutes < 9
    assert sum(gpu.NEEDS_S.values()) + 60 < 60 * networks.FULL.minutes, "with a minute for loading"


def test_a_section_may_begin_only_if_it_can_end_in_time() -> None:
    budget = Budget(100)
    assert budget.may_begin("short", 10)
    assert not budget.may_begin("long", 1000)
    assert budget.missing.keys() == {"long"}


def test_the_networks_are_those_of_the_published_checkpoints() -> None:
    """Their parameters, and the operations of a row at 512 and 1024 px."""
    for make, parameters, gflop in (
        (networks.Network.sd15, 859_520_964, 803),
        (networks.Network.sdxl, 2_567_463_684, 6761),
    ):
        network = make(networks.FULL, torch.device("meta"))
        assert sum(weights.numel() for weights in network.unet.parameters()) == parameters
        assert network.gflop() == pytest.approx(gflop, rel=1e-3)


def test_the_second_network_is_replayed_where_there_is_a_recorder() -> None:
    recorder = CpuRecorder()
    _, speeds = bare.sdxl(SMALLEST, CPU, recorder)
    assert speeds.keys() == set(SMALLEST.sdxl_rows)
    assert recorder.replays > 2


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu"])
    with pytest.raises(SystemExit, match="--device cpu"):
        command.main()
