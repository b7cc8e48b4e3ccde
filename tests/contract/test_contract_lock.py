"""The lock files hold what is declared, with hashes, and neither addresses nor what depends on the build of torch."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "requirements"
PROJECTS = ("client", "models/underpaint-mini", "service")
NOT_LOCKED = {"torch", "underpaint", "underpaint-mini", "underpaint-server"}
INPUTS = {"build": "build.in", "deploy": "deploy.in", "dev": "dev.in", "peers": "peers.in"}


def locked(name: str) -> list[tuple[Requirement, list[str]]]:
    """The requirements of a lock file, each with its hashes."""
    text = re.sub(r"^\s*#.*$", "", (LOCKS / f"{name}.txt").read_text(), flags=re.MULTILINE)
    entries = [entry.split("--hash=") for entry in text.replace("\\\n", " ").splitlines() if entry.strip()]
    return [(Requirement(first), [digest.strip() for digest in digests]) for first, *digests in entries]


def pins(name: str) -> dict[str, set[str]]:
    """Versions of each package: several where they differ by Python or platform."""
    found: dict[str, set[str]] = {}
    for requirement, _ in locked(name):
        [version] = [specifier.version for specifier in requirement.specifier]
        found.setdefault(canonicalize_name(requirement.name), set()).add(version)
    return found


def declared(lock: str) -> list[Requirement]:
    """What is asked for by the files that the lock is made from."""
    if lock == "run":
        projects = (tomllib.loads((ROOT / project / "pyproject.toml").read_text()) for project in PROJECTS)
        lines = [line for project in projects for line in project["project"].get("dependencies", [])]
    else:
        lines = _lines(LOCKS / INPUTS[lock])
    requirements = map(Requirement, lines)
    return [requirement for requirement in requirements if canonicalize_name(requirement.name) not in NOT_LOCKED]


def _lines(file: Path) -> list[str]:
    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    others = [line.removeprefix("-r ") for line in lines if line.startswith("-r ")]
    own = [line for line in lines if line and not line.startswith("-")]
    return own + [line for other in others for line in _lines(file.parent / other)]


@pytest.mark.parametrize("lock", ["build", "deploy", "dev", "peers", "run"])
def test_what_is_declared_is_locked_in_a_version_it_allows(lock: str) -> None:
    found = pins(lock)
    for requirement in declared(lock):
        versions = found.get(canonicalize_name(requirement.name))
        assert versions, f"{requirement} is declared and not in requirements/{lock}.txt: run `make lock`"
        wrong = [version for version in versions if version not in requirement.specifier]
        assert not wrong, (
            f"requirements/{lock}.txt has {requirement.name} {wrong}, {requirement} is declared: run `make lock`"
        )


@pytest.mark.parametrize("lock", ["build", "deploy", "dev", "peers", "run"])
def test_every_package_has_one_exact_version_and_hashes(lock: str) -> None:
    for requirement, hashes in locked(lock):
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement
        assert requirement.url is None
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), requirement


@pytest.mark.parametrize("lock", ["build", "deploy", "peers", "run"])
def test_the_locks_agree_on_versions(lock: str) -> None:
    everything = pins("dev")
    differing = {name: versions for name, versions in pins(lock).items() if versions != everything.get(name, versions)}
    assert not differing, f"requirements/dev.txt has others: {differing}"


@pytest.mark.parametrize("lock", ["build", "deploy", "dev", "peers", "run"])
def test_no_lock_names_a_server_or_what_depends_on_the_build_of_torch(lock: str) -> None:
    assert "://" not in (LOCKS / f"{lock}.txt").read_text()
    names = pins(lock).keys()
    assert not names & NOT_LOCKED
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-", "triton"))], "name it in torch-cuda.in"


def test_one_version_of_torch_is_named_everywhere() -> None:
    pattern = r"^(?:ARG )?TORCH *\??= *(torch==\S+)$"
    named = {re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)[1] for file in ("Makefile", "Dockerfile")}  # type: ignore[index]
    assert len(named) == 1
