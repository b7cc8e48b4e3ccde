"""For every suite."""

import os
from collections.abc import Callable

# Test processes share the cores; see engine/worker.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings

# Its default deadline is a timed assertion.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

INVARIANCE = "batch invariance"
"""Name of the property in which a test says which kind of processor it has met."""


@pytest.fixture
def is_invariant(record_property: Callable[[str, object], None]) -> Callable[[str, int | None], bool]:
    """Whether a network's answers have the same bits at every batch size here: on some processors they do not, and
    exact jobs are pinned to a batch class. Takes number format and batch class of a model, and says them in the end."""

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
