"""How many CPU cores this process may use, and how much CPU time a process has used."""

import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_V1_MOUNTS: Final = ("cpu", "cpu,cpuacct", "cpuacct,cpu")
_V2_MOUNTS: Final = ("", "unified")


def usable_cores(root: Path = Path("/")) -> int:
    """Number of CPU cores that this process may use, at least 1.

    Its CPU affinity and the CPU quota of its control group may allow fewer than the machine has. A quota of a part of a
    core is rounded up. ``root`` is the directory that has ``proc`` and ``sys``.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min((cores, *(math.ceil(quota) for quota in _quotas(root))))


def cpu_seconds(pid: int) -> float | None:
    """CPU time of all threads of a process; None where the operating system does not tell, or not of that process."""
    if sys.platform != "linux":
        return None
    try:
        return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) gives, which Python lacks
    except OSError:
        return None


def _quotas(root: Path) -> Iterator[float]:
    """The quotas, in cores, of this process's control groups and of all groups above them."""
    for folder in _groups(root):
        try:
            if (folder / "cpu.max").exists():  # version 2
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            cores = int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # no such group here, or no quota: "max"
            continue
        if cores > 0:  # version 1 has -1 for no quota
            yield cores


def _groups(root: Path) -> Iterator[Path]:
    """Folders of this process's CPU control groups and of all groups above them.

    In a container the path in ``/proc/self/cgroup`` may be the one outside of it, while the mounted folder is already
    the container's own group; so the folders above include the mount itself.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in _V1_MOUNTS if controllers else _V2_MOUNTS:
            folder = root / "sys/fs/cgroup" / mount
            yield folder
            for part in Path(path).parts[1:]:
                folder = folder / part
                yield folder
