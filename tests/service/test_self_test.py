"""``underpaint-server self-test``: what it measures, what it says, and what a server does with it afterwards."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from support import checkpoints
from underpaint_server.backends import load, toy
from underpaint_server.jobs import Exactness
from underpaint_server.self_test import main
from underpaint_server.settings import SelfTestSettings, Settings


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """``main`` sends this process's log lines to a stderr that ends with the test."""
    yield
    structlog.reset_defaults()


def said(out: str) -> dict[str, str]:
    """Label -> value of each line."""
    return {line[:15].strip(): line[16:] for line in out.splitlines()}


def test_a_users_checkpoint_is_measured_completely_for_the_servers_that_come_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a shell runs it. A server's limit of time, which its environment may set, does not count."""
    directory, kept = checkpoints.build(tmp_path / "sd"), str(tmp_path / "cache")
    flags = ("--backend", "torch", "--max-batch-size", "4", "--cache-dir", kept, "--exact-batching-s", "0.001")
    line = (sys.executable, "-m", "underpaint_server", "self-test", str(directory), *flags)
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    lines = said(ended.stdout)
    assert lines["model"] == str(directory)
    assert lines["runs in"].startswith("float32 by torch ")
    compared = lines["any size"].split(" rows")[0].split(" of ")
    assert int(compared[1]) >= 640
    assert "at 2, " in lines["rows a second"]
    assert lines["batch class"].split()[0] in ("2", "4")
    assert lines["EDICT"].count("e-") == 2
    assert lines["its bits"] == "the same alone and beside others"
    assert lines["verdict"] == "exact"
    assert lines["kept in"] == kept
    assert "measuring whether the number of rows in a pass changes bits: 640 rows" in ended.stderr

    settings = Settings(backend="torch", max_batch_size=4, cache_dir=kept, exact_batching_s=0.001)
    info = load(str(directory), "mine", settings).facts.info
    assert info.exactness is (Exactness.ANY_SIZE if int(compared[0]) == 0 else Exactness.FIXED_SIZE)
    notes = capsys.readouterr().out
    assert "computing the fingerprint" in notes
    assert "trying" not in notes
    assert "measuring" not in notes


@pytest.mark.parametrize(
    ("place", "batching", "passes", "unequal"),
    [
        ("toy:", "auto", "of any size, which does not change a bit", 0),
        ("toy:", "pinned", "of 4 rows", 0),
        ("toy:pinned", "auto", "of 4 rows", 600),
    ],
)
def test_the_toy_in_passes_of_any_size_and_of_one(
    place: str, batching: str, passes: str, unequal: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = SelfTestSettings(directory=place, cache_dir=str(tmp_path), exact_batch_class=4, exact_batching=batching)
    assert main(settings) == 0
    lines = said(capsys.readouterr().out)
    assert lines["passes"] == passes
    assert int(lines["any size"].split(" of ")[0]) >= unequal
    assert ("fixed size" in lines) is (passes == "of 4 rows")


def test_a_backend_that_is_never_exact_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each of its answers is another one."""
    count, pull = itertools.count(), toy._pull
    monkeypatch.setattr(toy, "_pull", lambda abar: pull(abar) + 1e-6 * next(count))
    assert main(SelfTestSettings(directory="toy:", cache_dir=str(tmp_path))) == 1
    lines = said(capsys.readouterr().out)
    assert "a repeated pass has other bits" in lines["any size"]
    assert lines["passes"] == "without equal bits for equal rows"
    assert lines["its bits"] == "other ones beside other jobs"
    assert lines["verdict"].startswith("not exact")


def test_a_checkpoint_that_cannot_be_served_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SelfTestSettings(directory=str(tmp_path))) == 1
    assert "MODEL_NOT_READY" in capsys.readouterr().err
