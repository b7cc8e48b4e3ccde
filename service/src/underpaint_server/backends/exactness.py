"""Which passes give a row the same bits on this machine: measured once, and kept in the cache directory.

Two questions are answered for a model: whether the size of a pass changes the bits of a row, and how many rows a pass
should have where it does. The second answer depends on time, and is kept too, so that every start on a machine takes
the same one.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from math import inf
from pathlib import Path
from typing import Literal

import structlog
import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from underpaint_server import __version__, cache
from underpaint_server.backends.invariance import (
    CLASSES,
    STEPS,
    Comparison,
    Network,
    choose_class,
    compare,
    fingerprint,
    rows_of,
    time_passes,
)
from underpaint_server.backends.runtime import Runtime
from underpaint_server.cores import usable_cores
from underpaint_server.errors import ModelNotReady, OutOfMemory
from underpaint_server.jobs import Exactness
from underpaint_server.settings import Settings

log = structlog.get_logger(__name__)

SHORT = 1
"""Steps of the comparison of passes of one size, which only shows that nothing else changes bits."""
HOPELESS = 4
"""A comparison that would take this many times as long as it may is not begun."""
LINE_EVERY_S = 10.0
"""Shortest time between two lines of progress, in seconds."""

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows that work goes on: from its caption and its rows to a function that is told of the rows done."""


@dataclass(frozen=True, slots=True)
class Survey:
    """How a model is measured while it is loaded."""

    progress: Progress | None = None
    """None: lines in the log."""
    complete: bool = False
    """Measure everything, whatever the cache has, to the end and without a limit of time; the settings then only decide
    which of it is used."""


@dataclass(frozen=True, slots=True)
class Key:
    """What a measurement depends on. Results of another key are never used."""

    server: str
    """Version of this package."""
    backend: str
    version: str
    """Version of the backend's library."""
    model: str
    """Digest of the checkpoint."""
    dtype: str
    device: str
    """See :func:`describe`."""
    threads: int
    minimum: int
    maximum: int
    """Sizes of passes, as in :class:`Network`."""

    @property
    def identity(self) -> str:
        """The part that may change bits which the fingerprint's one pass does not have, on machines of one kind."""
        return f"{self.backend} {self.version} {self.dtype} {self.threads} threads"


class Entry(BaseModel):
    """What was measured, as it is kept in a file."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal[1] = 1
    key: Key
    fingerprint: str
    """See :func:`~underpaint_server.backends.invariance.fingerprint`."""
    pass_seconds: dict[PositiveInt, PositiveFloat] = {}
    """See :func:`~underpaint_server.backends.invariance.time_passes`."""
    timed_for: int = 0
    """``exact_batch_class`` with which passes were timed."""
    any_size: Comparison | None = None
    """Passes of all sizes."""
    limit_s: float | None = None
    """Seconds that this comparison had; None for no limit."""
    fallback: Comparison | None = None
    """Passes in the way that is used where the size changes bits: of one size, or row by row."""
    fallback_class: int | None = None
    """The size; None for row by row."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a model is run, and why."""

    exactness: Exactness
    native_class: int | None
    """Rows of each pass at the model's own size; None where it does not matter."""
    other_class: int | None
    """The same at other sizes, which are not measured."""
    measured: Entry


def key_of(runtime: Runtime, digest: str, device: torch.device, settings: Settings, network: Network) -> Key:
    """The key of a network on a device of this machine. Threads do not count on a GPU."""
    threads = (settings.threads or usable_cores()) if device.type == "cpu" else 0
    version, dtype = runtime.version, runtime.dtype
    kind = describe(device)
    return Key(__version__, runtime.name, version, digest, dtype, kind, threads, network.minimum, network.maximum)


def describe(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The kind of device: name and capability of a GPU; of a CPU the model and a digest of its instruction flags."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} {major}.{minor} CUDA {torch.version.cuda}"
    fields = {}
    try:
        for line in cpuinfo.read_text(errors="replace").partition("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    except OSError:  # not Linux
        fields = {"model name": platform.processor() or platform.machine()}
    flags = sha256(" ".join(sorted((fields.get("flags") or fields.get("Features", "")).split())).encode())
    numbers = (fields.get(name, "") for name in ("model name", "cpu family", "model", "stepping", "CPU part"))
    return " ".join([*filter(None, numbers), flags.hexdigest()[:16]])


def establish(
    network: Network,
    key: Key,
    settings: Settings,
    note: Callable[[str], None],
    survey: Survey | None = None,
) -> Verdict:
    """Find out how the network is to be run: from the cache directory, as far as it was measured here before.

    ``note`` is told what is being done. Raises :class:`ModelNotReady` if the smallest pass, or one of the batch class,
    does not fit the device's memory.
    """
    return _Establishing(network, key, settings, note, survey or Survey()).run()


class _Establishing:
    def __init__(
        self, network: Network, key: Key, settings: Settings, note: Callable[[str], None], survey: Survey
    ) -> None:
        self._network, self._key, self._settings, self._note = network, key, settings, note
        self._complete = survey.complete
        self._progress = survey.progress or self._log_progress
        self._limit_s = inf if survey.complete else settings.exact_batching_s
        self._is_auto = settings.exact_batching == "auto"
        self._given = 0 if network.isolate else min(settings.exact_batch_class, network.maximum)

    def run(self) -> Verdict:
        kept = None if self._complete else _read(self._settings, self._key)
        self._note("computing the fingerprint")
        entry = Entry(key=self._key, fingerprint=self._fingerprint())
        if kept is not None and kept.fingerprint != entry.fingerprint:
            self._note("it has other bits than when it was measured, so it is measured again")
            kept = None
        verdict = self._judge(self._measure(kept or entry))
        if verdict.measured != kept:
            text = json.dumps(verdict.measured.model_dump(mode="json"), indent=1)
            cache.write(self._settings, _name(self._key), text)
        self._explain(verdict)
        return verdict

    def _measure(self, entry: Entry) -> Entry:
        """The entry with what it lacks of pass times and the comparison of sizes."""
        if not entry.pass_seconds or entry.timed_for != self._given:
            entry = entry.model_copy(update={"pass_seconds": self._times(), "timed_for": self._given})
        if (self._is_auto or self._complete) and not self._is_settled(entry):
            limit_s = None if self._limit_s == inf else self._limit_s
            entry = entry.model_copy(update={"any_size": self._any_size(entry), "limit_s": limit_s})
        return entry

    def _is_settled(self, entry: Entry) -> bool:
        """Whether the comparison of sizes came to an end, or was ended after at least as much time as it may take."""
        if entry.any_size is None:
            return False
        return entry.any_size.is_exact is not None or (entry.limit_s or inf) >= self._limit_s

    def _judge(self, entry: Entry) -> Verdict:
        """How the network is run; where the size of passes changes bits, the way around it is measured too."""
        is_invariant = None if entry.any_size is None else entry.any_size.is_exact
        batch_class = None if self._network.isolate else self._given or choose_class(entry.pass_seconds)
        if self._is_auto and is_invariant:
            return Verdict(Exactness.ANY_SIZE, None, batch_class, entry)
        exactness = Exactness.ROW_BY_ROW if batch_class is None else Exactness.FIXED_SIZE
        if self._network.isolate:
            self._network.isolate()
        if batch_class is not None and batch_class not in entry.pass_seconds:
            raise ModelNotReady(_too_large(batch_class, "a smaller --exact-batch-class"))
        if self._complete or is_invariant is False:
            if entry.fallback is None or entry.fallback_class != batch_class:
                found = self._fallback(batch_class)
                entry = entry.model_copy(update={"fallback": found, "fallback_class": batch_class})
            if entry.fallback is not None and entry.fallback.is_exact is False:
                exactness = Exactness.INEXACT
        return Verdict(exactness, batch_class, batch_class, entry)

    # --- measurements ----------------------------------------------------------------------------------------------

    def _fingerprint(self) -> str:
        try:
            return fingerprint(self._network, self._key.identity)
        except (OutOfMemory, torch.OutOfMemoryError) as error:
            raise ModelNotReady(_too_large(self._network.minimum, "a --dtype of half precision")) from error

    def _times(self) -> dict[int, float]:
        self._note("measuring how long a pass takes")
        smallest = self._network.minimum if self._network.isolate else max(self._network.minimum, 2)
        sizes: Sequence[int] = CLASSES
        if self._complete:
            sizes = sorted({smallest, *CLASSES, self._given} - {0})
        elif self._network.isolate or self._given:
            sizes = [smallest, self._given]
        return time_passes(self._network, sizes, limit_s=self._limit_s, thorough=self._complete or bool(self._given))

    def _any_size(self, entry: Entry) -> Comparison | None:
        """None if the largest pass does not fit the memory."""
        row_s = min(seconds / size for size, seconds in entry.pass_seconds.items())
        if 2 * rows_of(STEPS) * row_s > HOPELESS * self._limit_s:
            return Comparison.none()
        return self._compare(self._network, "measuring whether the number of rows in a pass changes bits", STEPS)

    def _fallback(self, batch_class: int | None) -> Comparison | None:
        network, way = self._network, "row by row"
        if batch_class is not None:
            network = replace(network, minimum=batch_class, maximum=batch_class)
            way = f"in passes of {batch_class} rows"
        caption = f"measuring whether equal rows have equal bits {way}"
        return self._compare(network, caption, STEPS if self._complete else SHORT)

    def _compare(self, network: Network, caption: str, steps: int) -> Comparison | None:
        with self._progress(caption, rows_of(steps)) as advance:
            try:
                return compare(network, steps=steps, limit_s=self._limit_s, stop=not self._complete, advance=advance)
            except (OutOfMemory, torch.OutOfMemoryError):
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self._note(f"passes of {network.maximum} rows do not fit the device; use a smaller --max-batch-size")
                return None

    # --- what people are told --------------------------------------------------------------------------------------

    def _explain(self, verdict: Verdict) -> None:
        """Say how the network is run, and why."""
        compared, batch_class = verdict.measured.any_size, verdict.native_class
        way = "each row is computed by itself" if batch_class is None else f"every pass has {batch_class} rows"
        match verdict.exactness:
            case Exactness.ANY_SIZE:
                self._note("the number of rows in a pass changes no bit")
            case Exactness.INEXACT:
                log.warning(
                    "equal rows have different bits in passes of one size too, so no inversion is exact; use another"
                    " --backend, --dtype or --device, and run underpaint-server self-test",
                    digest=self._key.model,
                    backend=self._key.backend,
                    dtype=self._key.dtype,
                )
            case _ if compared is not None and compared.is_exact is False:
                self._note(f"the number of rows in a pass changes bits, by up to {compared.largest:.1e}, so {way}")
            case _ if self._is_auto:
                self._note(
                    f"--exact-batching-s was too short to measure whether the number of rows in a pass changes bits, so"
                    f" {way}; underpaint-server self-test measures it completely and keeps the result for later starts"
                )
            case _:
                self._note(way)

    @contextmanager
    def _log_progress(self, caption: str, total: int) -> Iterator[Callable[[int], None]]:
        self._note(caption)
        done, last_line = 0, time.monotonic()

        def advance(rows: int) -> None:
            nonlocal done, last_line
            done += rows
            if time.monotonic() - last_line >= LINE_EVERY_S:
                last_line = time.monotonic()
                self._note(f"{caption}: {done} of {total} rows")

        yield advance


def _too_large(rows: int, advice: str) -> str:
    return f"a pass of {rows} rows does not fit in the device's memory; use {advice}"


# --- files ---------------------------------------------------------------------------------------------------------


def _name(key: Key) -> str:
    return f"exactness/{sha256(repr(key).encode()).hexdigest()[:32]}.json"


def _read(settings: Settings, key: Key) -> Entry | None:
    """What was measured with this key; None if nothing was, or if it cannot be read."""
    try:
        data = cache.read(settings, _name(key))
        if data is None:
            return None
        entry = Entry.model_validate_json(data)
    except (OSError, ValueError) as error:
        problem = str(error)
    else:
        if entry.key == key:
            return entry
        problem = "it is of another model or machine"
    log.warning("a file of measurements cannot be used and is written again", file=_name(key), error=problem)
    return None
