"""The largest passes, learned for each kind and shape of rows: what fits in memory, and what is worth its latency.

Memory: a pass that does not fit halves its cap. Speed: a larger pass that computes no more rows a second only makes
everybody wait longer. After some full passes, a cap is tried against its half or its double. The two sizes alternate,
so that both meet the same machine, however busy it is. The half is taken if it gives as many rows a second, within
:data:`TOLERANCE`; the double if it fits and gives more. Every trial that changes nothing doubles the number of passes
until the next. Only passes whose size changes no bits come here.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import structlog

from underpaint_server import cache
from underpaint_server.rows import Key

_log = structlog.get_logger(__name__)

TOLERANCE: Final = 0.03
"""Share of the rows a second that a smaller pass may lose."""
TRIES: Final = 8
"""Passes of each of the two sizes in a trial."""
FIRST_WAIT: Final = 64
"""Full passes before the first trial."""
MAX_WAIT: Final = 2**14
"""Most full passes between two trials."""
LONG_S: Final = 0.01
"""A pass that is shorter than this, in seconds, delays nobody enough to be halved."""
MOST: Final = 64
"""Most keys that are remembered, in memory and in the file. Callers choose the shapes."""


@dataclass(slots=True)
class _Cap:
    """The cap of one key."""

    rows: int
    wait: int = FIRST_WAIT
    full: int = 0
    """Full passes since the last trial."""
    trial: int | None = None
    """The size that is tried."""
    larger: bool = False
    """Whether the next trial is of the double, where both the half and the double may be tried."""
    seconds: dict[int, list[float]] = field(default_factory=dict)
    """Durations of the trial's passes, by size."""
    told: int | None = None
    """What :meth:`Caps.news` said last."""

    @property
    def now(self) -> int:
        """Most rows of the next pass: during a trial, the two sizes in turn."""
        if self.trial is None or len(self.seconds[self.rows]) < len(self.seconds[self.trial]):
            return self.rows
        return self.trial


class Caps:
    """Most rows of a pass, by key; at most ``limit``.

    ``file`` keeps what was learned beyond this process, None does not. ``names`` are the names of the models in it, by
    their ids; models that compute alike have equal ones.
    """

    def __init__(self, limit: int, file: Path | None = None, names: Mapping[str, str] | None = None) -> None:
        self._limit = limit
        self._file = file
        self._names = names or {}
        self._caps: OrderedDict[Key, _Cap] = OrderedDict()
        self._known = _read(file)

    def __getitem__(self, key: Key) -> int:
        """Most rows of the next pass of this key."""
        return self._of(key).now

    def news(self, key: Key) -> int | None:
        """The cap of this key, whatever is being tried; None if it is what this method said last."""
        cap = self._of(key)
        if cap.told == cap.rows:
            return None
        cap.told = cap.rows
        return cap.rows

    def passed(self, key: Key, rows: int, duration_s: float) -> None:
        """A pass of ``rows`` rows took ``duration_s`` seconds; ``rows`` count without padding."""
        cap = self._of(key)
        if cap.trial is not None:
            seconds = cap.seconds.get(rows)
            if seconds is not None and len(seconds) < TRIES:
                seconds.append(duration_s)
            if len(cap.seconds[cap.rows]) == len(cap.seconds[cap.trial]) == TRIES:
                self._decide(key, cap, cap.trial)
        elif rows == cap.rows:
            cap.full += 1
            if cap.full >= cap.wait:
                self._try(cap, may_halve=duration_s >= LONG_S)

    def failed(self, key: Key, rows: int) -> None:
        """A pass of ``rows`` rows, at least 2, did not fit in the device's memory."""
        cap = self._of(key)
        cap.rows = min(cap.rows, rows // 2) if cap.trial is None or rows <= cap.rows else cap.rows
        self._end_trial(key, cap, wait=2 * cap.wait)

    def _of(self, key: Key) -> _Cap:
        cap = self._caps.get(key)
        if cap is None:
            cap = self._remembered(key)
            self._caps[key] = cap
            if len(self._caps) > MOST:
                self._caps.popitem(last=False)
        else:
            self._caps.move_to_end(key)
        return cap

    def _try(self, cap: _Cap, *, may_halve: bool) -> None:
        sizes = {False: cap.rows // 2 if may_halve else 0, True: min(2 * cap.rows, self._limit)}
        possible = [larger for larger, size in sizes.items() if size not in (0, cap.rows)]
        cap.full = 0
        if possible:
            larger = cap.larger if cap.larger in possible else possible[0]
            cap.trial, cap.larger = sizes[larger], not larger
            cap.seconds = {cap.rows: [], sizes[larger]: []}

    def _decide(self, key: Key, cap: _Cap, trial: int) -> None:
        """End a trial: take the smallest size that is within the tolerance of the faster."""
        pace = {size: size / max(median(seconds), 1e-9) for size, seconds in cap.seconds.items()}
        chosen = min(size for size in pace if pace[size] >= (1 - TOLERANCE) * max(pace.values()))
        wait = FIRST_WAIT if chosen == trial else 2 * cap.wait
        cap.rows = chosen
        self._end_trial(key, cap, wait)

    def _end_trial(self, key: Key, cap: _Cap, wait: int) -> None:
        cap.trial, cap.seconds, cap.full, cap.wait = None, {}, 0, min(wait, MAX_WAIT)
        self._write(key, cap)

    # --- the file ------------------------------------------------------------------------------------------------

    def _remembered(self, key: Key) -> _Cap:
        with suppress(TypeError, ValueError, KeyError, OverflowError):
            entry = self._known[self._name(key)]
            rows, wait, limit = (int(entry[name]) for name in ("rows", "wait", "limit"))
            if limit != self._limit:  # what was not possible then may be now
                rows, wait = self._limit if rows == limit else rows, FIRST_WAIT
            if rows >= 1 and wait >= 1:
                return _Cap(min(rows, self._limit), min(wait, MAX_WAIT))
        return _Cap(self._limit)

    def _name(self, key: Key) -> str:
        shape = "x".join(map(str, key.shape))
        return f"{self._names.get(key.model, key.model)} {kind_name(key)} {shape}"

    def _write(self, key: Key, cap: _Cap) -> None:
        """Keep a cap in the file, beside what other servers on this machine have written there since."""
        if self._file is None:
            return
        known = _read(self._file)
        known.pop(self._name(key), None)
        known[self._name(key)] = {"rows": cap.rows, "wait": cap.wait, "limit": self._limit}
        newest = dict(list(known.items())[-MOST:])
        try:
            cache.replace(self._file, json.dumps(newest, indent=1) + "\n")
        except OSError as error:
            _log.warning("the sizes of passes cannot be kept", file=str(self._file), error=str(error))
            self._file = None


def kind_name(key: Key) -> str:
    """The kind of a key's rows in lower case, as in reports and metrics."""
    return key.kind.__name__.lower()


def _read(file: Path | None) -> dict[str, Any]:
    """What the file says; nothing where there is none or it cannot be read."""
    try:
        known = json.loads(file.read_text()) if file is not None else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _log.warning("the sizes of passes that were kept cannot be read", file=str(file), error=str(error))
        return {}
    return known if isinstance(known, dict) else {}
