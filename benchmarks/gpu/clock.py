"""Time on a device: of one call, and of all sections of a run."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

CALLS = 8
"""Calls that are queued before the host waits: enough that the device is not idle, few enough to end in time."""


def seconds(call: Callable[[], object], device: torch.device, least_s: float) -> float:
    """Mean seconds of a call that is queued again and again for at least ``least_s`` seconds, after one to warm up."""
    with torch.inference_mode():
        call()
        synchronize(device)
        calls, began = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - began < least_s:
            for _ in range(CALLS):
                call()
            calls += CALLS
            synchronize(device)
        return (time.perf_counter() - began) / calls


def synchronize(device: torch.device) -> None:
    """Wait until all that was queued is computed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float:
    """The most memory that was reserved on the device since the last call, in GiB; 0 on the CPU."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_reserved(device) / 2**30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class Budget:
    """The time of a run, and what became of its sections."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began = time.monotonic()
        self.taken_s: dict[str, float] = {}
        """Section -> seconds that it took."""
        self.missing: dict[str, str] = {}
        """Section that was not measured -> why."""

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self._limit_s - (time.monotonic() - self._began)

    def may_begin(self, section: str, needs_s: float) -> bool:
        """Whether there is time for a section that usually takes so many seconds; if not, it is noted."""
        if self.left_s < needs_s:
            left_s = max(0.0, self.left_s)
            self.missing[section] = f"skipped: {left_s:.0f} s were left, and it takes about {needs_s:.0f} s"
        return section not in self.missing

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Measure how long the block takes. What it raises is noted; the sections after it are still measured."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            self.missing[name] = f"failed: {type(error).__name__}: {error}"
        finally:
            self.taken_s[name] = time.monotonic() - began
