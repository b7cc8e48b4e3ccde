"""Whether Prometheus likes a metrics page: its rules restated, and the real promtool where it is installed."""

import re
import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families


def lint(page: str) -> list[str]:
    """The complaints of ``promtool check metrics``, restated: _total on counters alone, base units, help, case."""
    counters = re.findall(r"^# TYPE (\S+) counter$", page, re.MULTILINE)
    problems = [f"{name}: counter without _total" for name in counters if not name.endswith("_total")]
    for family in text_string_to_metric_families(page):
        name = family.name + ("_total" if family.type == "counter" else "")
        if family.type != "counter" and family.name.endswith(("_total", "_count", "_sum", "_bucket")):
            problems.append(f"{name}: reserved suffix")
        if not family.documentation:
            problems.append(f"{name}: no help")
        if re.search(r"_(milliseconds|ms|minutes|hours|kilobytes|megabytes|mb)(_|$)", name):
            problems.append(f"{name}: not a base unit")
        if re.search(r"[A-Z]", name):
            problems.append(f"{name}: not snake_case")
    return problems


def promtool(page: str) -> list[str]:
    """The complaints of the real tool; the test that asks is skipped where it is not installed."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it); the restated rules were checked")
    done = subprocess.run([found, "check", "metrics"], input=page, text=True, capture_output=True, check=False)
    return (done.stdout + done.stderr).splitlines() + ([] if done.returncode == 0 else [f"exit {done.returncode}"])
