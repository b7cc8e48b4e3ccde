"""What the README tells people to type, typed."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from support.jobs import disc, read_picture
from underpaint_server.local_server import LocalServer

README = (Path(__file__).parents[2] / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = re.findall(r"^underpaint (?:edit|mask|invert|models|learn|directions)\b.*$", README, re.MULTILINE)


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with LocalServer(models="toy=toy:") as server:
        yield server.target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.fromarray(disc(100)).save(tmp_path / "photo.png")
    Image.fromarray(disc(100, (40, 40, 220))).save(tmp_path / "other.png")
    (tmp_path / "photos").mkdir()
    Image.fromarray(disc(100)).save(tmp_path / "photos" / "first.jpg")
    return tmp_path


def test_there_is_something_to_type() -> None:
    """Or the tests below would pass over a README that they cannot read any more."""
    assert len(PYTHON) >= 3
    assert len(SHELL) >= 5


@pytest.mark.parametrize("code", PYTHON, ids=["client", "learning", "stubs"])
def test_python(code: str, folder: Path, target: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code.replace("localhost:50051", target)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert read_picture(folder / "green.png").size == (32, 32)


def test_shell(folder: Path, target: str) -> None:
    """In the README's order, in one folder and on one server: a later command uses what an earlier one made."""
    program = Path(sys.executable).with_name("underpaint")
    for command in SHELL:
        done = subprocess.run(
            command.replace("underpaint", str(program), 1),
            shell=True,
            cwd=folder,
            env={**os.environ, "UNDERPAINT_TARGET": target},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout, command
    for picture in ("out.png", "edited/first.jpg", "mask.png", "mixed.png", "green.png"):
        Image.open(folder / picture).load()
