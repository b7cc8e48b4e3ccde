"""For every suite."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

# Test processes share the cores; see engine/worker.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A spare engine process would cost every server of a test seconds of both cores; tests of it switch it on.
os.environ.setdefault("UNDERPAINT_SPARE_ENGINE", "false")
# Tests stop engine processes to hold what they do, for as long as a slow machine needs.
os.environ.setdefault("UNDERPAINT_STALL_S", "600")
# Tests of what a server is installed with say so; the others use torch in float32, which starts fastest.
os.environ.setdefault("UNDERPAINT_BACKEND", "torch")
os.environ.setdefault("UNDERPAINT_DTYPE", "float32")
# A network is measured to the end, however busy the machine is.
os.environ.setdefault("UNDERPAINT_EXACT_BATCHING_S", "3600")
# The tests' own, so that no test reads or leaves anything in a user's; one for all, because making it takes time.
os.environ.setdefault("UNDERPAINT_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "tests"))

import pytest
from hypothesis import settings

# Stock channels and scrapes go to servers on this machine, and not to a proxy that the environment may name.
_NO_PROXY = ",".join(filter(None, (os.environ.get("no_proxy"), "localhost,127.0.0.1")))
os.environ |= {"no_proxy": _NO_PROXY, "no_grpc_proxy": _NO_PROXY}

# Its default deadline is a timed assertion.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

INVARIANCE = "batch invariance"
"""Name of the property in which a test says which kind of processor it has met."""


@pytest.fixture
def is_invariant(record_property: Callable[[str, object], None]) -> Callable[[str, int | None], bool]:
    """Whether a network's answers have the same bits at every batch size here: on some processors they do not, and
    passes are pinned to a batch class. Takes number format and batch class of a model, and says them in the end."""

    def note(dtype: str, batch_class: int | None) -> bool:
        record_property(INVARIANCE, f"{dtype} {'yes' if batch_class is None else f'no (pinned to {batch_class})'}")
        return batch_class is None

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which kind of processor the networks of the tests have met."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    said = {value for report in reports for name, value in getattr(report, "user_properties", ()) if name == INVARIANCE}
    if said:
        terminalreporter.write_line(f"{INVARIANCE}: {', '.join(sorted(map(str, said)))}")


LONG = (
    "tests/benchmarks/test_quality.py",
    "tests/e2e/test_e2e_exact.py",
    "tests/e2e/test_e2e_learning.py",
    "tests/service/backends/",
    "tests/examples/",
    "tests/e2e/",
    "models/underpaint-mini/tests/test_training.py",
)
"""What takes longest. It is begun first, so that no worker is left with it when the others have nothing more to do."""


def pytest_configure(config: pytest.Config) -> None:
    """Keep ``--dist loadgroup`` from sorting the groups by their number of tests, which would undo :data:`LONG`.

    And take over the networks that ``make`` has exported; the tests add others.
    """
    config.option.loadscopereorder = False
    ours = Path(os.environ["UNDERPAINT_CACHE_DIR"]) / "onnx"
    made = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "underpaint" / "onnx"
    if made.is_dir() and not ours.exists():
        shutil.copytree(made, ours, dirs_exist_ok=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests that share a fixture to one worker (``--dist loadgroup``), so that each server is started once.

    Shared are fixtures of a module or of the session. A test that gets one by a parameter's value, which is the
    fixture's name, belongs to that group too.
    """
    shared = {item: set(_shared(item)) for item in items}
    names = {name for fixtures in shared.values() for _, name in fixtures}
    scopes = {fixture for fixtures in shared.values() for fixture in fixtures}
    for item, fixtures in shared.items():
        named = names.intersection(_values(item))
        fixtures |= {(base, name) for base, name in scopes if name in named and item.nodeid.startswith(base)}
    groups: dict[tuple[str, str], tuple[str, str]] = {}

    def group_of(fixture: tuple[str, str]) -> tuple[str, str]:
        while (other := groups.get(fixture, fixture)) != fixture:
            fixture = other
        return fixture

    for fixtures in shared.values():
        roots = sorted(group_of(fixture) for fixture in fixtures)
        groups.update((root, roots[0]) for root in roots)
    for item, fixtures in shared.items():
        if fixtures:
            base, name = group_of(min(fixtures))
            item.add_marker(pytest.mark.xdist_group(f"{base.rpartition('/')[2].removesuffix('.py')}.{name}"))
    first = {
        item: next((i for i, path in enumerate(LONG) if item.nodeid.startswith(path)), len(LONG)) for item in items
    }
    items.sort(key=lambda item: (first[item], not shared[item]))


def _shared(item: pytest.Item) -> Iterator[tuple[str, str]]:
    """Where each fixture is defined that the test shares with others, and its name."""
    for name, definitions in item._fixtureinfo.name2fixturedefs.items():  # type: ignore[attr-defined]
        if definitions[-1].baseid and definitions[-1].scope in ("module", "package", "session"):
            yield definitions[-1].baseid, name


def _values(item: pytest.Item) -> set[str]:
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return {value for value in parameters if isinstance(value, str)}
