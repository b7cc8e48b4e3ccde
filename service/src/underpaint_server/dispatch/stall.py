"""Tells an engine process that makes no progress from one that is slow.

Time alone cannot: on a busy machine a pass may take a hundred times as long as on an idle one. So the CPU time of the
process is read too. A stopped process gets none; one that waits for a lock or a device for ever gets next to none; one
that spins gets much more than such a pass has ever needed. Times are sums of the intervals between two looks, each of
them bounded, so that nothing counts while the front process itself is suspended.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass

from underpaint_server.cores import usable_cores
from underpaint_server.engine.messages import Passing

FACTOR = 10
"""A pass is overdue after this many times the duration of the slowest such pass."""
UNMEASURED_S = 600.0
"""Seconds after which a pass is overdue when no such pass has been measured, and so is work between two passes."""
UNMEASURED_CPU_S = 3600.0
"""CPU seconds, on each usable core, that such a pass may take at most."""
IDLE = 0.001
"""A process that gets less than this share of one core does not compute. The engine process wakes up once a second even
if it only waits, which takes a tenth of that."""
FORGET = 0.97
"""Factor by which the duration of the slowest pass shrinks with every faster one."""
MAX_KINDS = 256
"""Kinds of pass whose durations are kept; callers choose shapes."""

_Kind = tuple[str, str, tuple[int, ...]]


class CpuUse:
    """The CPU time that a process got during the last ``window_s`` seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._looks: deque[tuple[float, float]] = deque()
        self._time_s = 0.0
        self.total_s: float | None = None
        """CPU time of the process at the last look; None if it is not known."""

    def look(self, cpu_s: float | None, elapsed_s: float) -> None:
        """The process has used ``cpu_s`` seconds so far; ``elapsed_s`` seconds have passed since the last look."""
        self._time_s += elapsed_s
        self.total_s = cpu_s
        if cpu_s is None:
            self._looks.clear()
            return
        self._looks.append((self._time_s, cpu_s))
        while len(self._looks) > 2 and self._looks[1][0] <= self._time_s - self._window_s:
            self._looks.popleft()

    @property
    def share(self) -> float | None:
        """CPU time by time during the window, 1 for one core; None before it has been watched for so long."""
        if not self._looks:
            return None
        (began_s, began_cpu_s), (ended_s, ended_cpu_s) = self._looks[0], self._looks[-1]
        if ended_s - began_s < self._window_s:
            return None
        return (ended_cpu_s - began_cpu_s) / (ended_s - began_s)


@dataclass(slots=True)
class _Slowest:
    """Of one kind of pass, by row."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def add(self, wall_s: float, cpu_s: float) -> None:
        self.wall_s = max(wall_s, FORGET * self.wall_s)
        self.cpu_s = max(cpu_s, FORGET * self.cpu_s)


class PassWatch:
    """Whether what the engine does now takes too long, by earlier passes of the same model, kind and shape.

    No pass is overdue before ``floor_s`` seconds and as many CPU seconds.
    """

    def __init__(self, floor_s: float) -> None:
        self._floor_s = floor_s
        self._slowest: OrderedDict[_Kind, _Slowest] = OrderedDict()
        self._current: Passing | None = None
        self._wall_s = 0.0
        self._began_cpu_s: float | None = None

    def begin(self, report: Passing, cpu_s: float | None) -> None:
        """A pass begins; the process has used ``cpu_s`` CPU seconds so far."""
        self._current, self._wall_s, self._began_cpu_s = report, 0.0, cpu_s

    def end(self, wall_s: float, cpu_s: float) -> None:
        """The pass took ``wall_s`` seconds and ``cpu_s`` CPU seconds."""
        if self._current is not None:
            kind = _kind(self._current)
            slowest = self._slowest.setdefault(kind, _Slowest())
            slowest.add(wall_s / self._current.rows, cpu_s / self._current.rows)
            self._slowest.move_to_end(kind)
            if len(self._slowest) > MAX_KINDS:
                self._slowest.popitem(last=False)
        self.rest()

    def rest(self) -> None:
        """No pass runs: the engine is between two of them, idle, or another process."""
        self._current, self._wall_s, self._began_cpu_s = None, 0.0, None

    def look(self, elapsed_s: float) -> None:
        """The engine has had work for ``elapsed_s`` seconds more."""
        self._wall_s += elapsed_s

    def is_overdue(self, use: CpuUse) -> bool:
        """Whether the pass takes longer than any healthy one could, by the CPU time that its process gets."""
        wall_s, cpu_s = self._limits()
        if self._wall_s <= wall_s:
            return False
        if use.total_s is None:
            return self._wall_s > max(wall_s, UNMEASURED_S)
        if use.share is not None and use.share < IDLE:
            return True
        return self._began_cpu_s is not None and use.total_s - self._began_cpu_s > cpu_s

    def _limits(self) -> tuple[float, float]:
        """Seconds and CPU seconds of the slowest pass that counts as healthy."""
        slowest = None if self._current is None else self._slowest.get(_kind(self._current))
        if slowest is None or self._current is None:
            return UNMEASURED_S, UNMEASURED_CPU_S * usable_cores()
        rows = FACTOR * self._current.rows
        return max(self._floor_s, rows * slowest.wall_s), max(self._floor_s, rows * slowest.cpu_s)


def _kind(report: Passing) -> _Kind:
    return report.model, report.kind, report.shape
