"""For every suite."""

import os

# Test processes share the cores; see engine/worker.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
