"""The version stands in one file, and everything that says it agrees."""

import re
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import underpaint
import underpaint_server

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "client" / "src" / "underpaint" / "_version.py"
SAYS_IT = re.compile(rf'"(?:\w+==)?{re.escape(underpaint.__version__)}"')


def test_one_file_says_it() -> None:
    places = [path for top in ("client", "service", "models") for path in (ROOT / top).rglob("*.py")]
    places += ROOT.rglob("pyproject.toml")
    saying = [path for path in places if ".venv" not in path.parts and SAYS_IT.search(path.read_text())]
    assert saying == [SOURCE]


@pytest.mark.parametrize("distribution", ["underpaint", "underpaint-server", "underpaint-mini"])
def test_every_distribution_has_it(distribution: str) -> None:
    assert version(distribution) == underpaint.__version__, "installed before the version changed: install again"
    assert underpaint_server.__version__ == underpaint.__version__


def test_the_server_asks_for_the_client_of_its_own_version() -> None:
    assert f"underpaint=={underpaint.__version__}" in (requires("underpaint-server") or [])


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("CHANGELOG.md", r"^## ([\d.]+)"),
        ("deploy/README.md", r"underpaint:([\d.]+)"),
        ("deploy/compose.yaml", r"underpaint:([\d.]+)"),
        ("deploy/kubernetes/base/kustomization.yaml", r"newTag: ([\d.]+)"),
    ],
)
def test_what_is_released_under_it_names_it(path: str, pattern: str) -> None:
    found = re.search(pattern, (ROOT / path).read_text(), re.MULTILINE)
    assert found is not None
    assert found[1] == underpaint.__version__
