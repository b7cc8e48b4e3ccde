"""For every suite."""

import os

# Test processes share the cores; see engine/worker.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hypothesis import settings

# Its default deadline is a timed assertion.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
