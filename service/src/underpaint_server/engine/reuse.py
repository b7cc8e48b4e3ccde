"""Rows with equal names are computed once: kept answers, and rows that wait at the same time for the same answer."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence, Set
from typing import Any, Final

import torch

from underpaint_server.engine.scheduler import WaitingRow
from underpaint_server.rows import Captured, Embedded, Key

Name = tuple[Key, Hashable]
"""Of an answer: the row's name, and its key, since rows of another model or batch class have other answers."""

OVERHEAD: Final = 1024
"""Bytes that an answer takes besides its numbers, rounded up."""


class Answers:
    """Answers to named rows that were computed before.

    Together they take at most ``max_bytes`` bytes of the device's memory; those used longest ago are dropped first.
    With 0, nothing is kept and no row has a twin. Answers are shared between jobs, so nobody may change them.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Name, Any] = OrderedDict()
        self.bytes = 0
        """Bytes of all kept answers."""

    def __len__(self) -> int:
        return len(self._kept)

    def name(self, row: WaitingRow) -> Name | None:
        """The name under which the row's answer is kept; None for a row without a name."""
        return None if row.name is None or not self._max_bytes else (row.key, row.name)

    def get(self, row: WaitingRow) -> Any | None:
        """The kept answer to a row; None if there is none."""
        name = self.name(row)
        if name is None or name not in self._kept:
            return None
        self._kept.move_to_end(name)
        return self._kept[name]

    def keep(self, row: WaitingRow, answer: Any) -> None:
        """Keep the answer to a row, if it has a name."""
        name = self.name(row)
        if name is None or name in self._kept:
            return
        try:
            answer = _alone(answer)
        except torch.OutOfMemoryError:
            self.clear()
            return
        if _bytes(answer) > self._max_bytes:
            return
        self._kept[name] = answer
        self.bytes += _bytes(answer)
        while self.bytes > self._max_bytes:
            self.bytes -= _bytes(self._kept.popitem(last=False)[1])

    def forget(self, names: Set[Name]) -> None:
        """Drop these answers."""
        for name in names & self._kept.keys():
            self.bytes -= _bytes(self._kept.pop(name))

    def clear(self) -> bool:
        """Drop all answers; False if there was none."""
        had_any = bool(self._kept)
        self._kept.clear()
        self.bytes = 0
        return had_any


class Twins:
    """The waiting rows, one for each answer that they wait for."""

    def __init__(self, rows: Sequence[WaitingRow], answers: Answers) -> None:
        self._groups: dict[Any, list[WaitingRow]] = {}
        for row in rows:
            self._groups.setdefault(answers.name(row) or (row.job, row.index), []).append(row)
        self._answers = answers

    @property
    def firsts(self) -> list[WaitingRow]:
        """One row for each answer: of the highest priority, and of these the one with the earliest virtual deadline."""
        return [min(group, key=_rank) for group in self._groups.values()]

    def of(self, row: WaitingRow) -> list[WaitingRow]:
        """The other rows that wait for the same answer."""
        name = self._answers.name(row)
        return [] if name is None else [twin for twin in self._groups[name] if twin is not row]


def _alone(answer: Any) -> Any:
    """An answer without the memory of its neighbours: tensors of one pass are views of one block, which would stay as a
    whole for a single row."""
    match answer:
        case Captured(noise_pred=noise_pred, features=features):
            return Captured(_alone(noise_pred), {site: _alone(values) for site, values in features.items()})
        case Embedded(prompt_embeds=prompt_embeds, dropped=dropped):
            return Embedded(_alone(prompt_embeds), dropped)
        case _:
            return answer if answer.untyped_storage().nbytes() == answer.nbytes else answer.clone()


def _bytes(answer: Any) -> int:
    match answer:
        case Captured(noise_pred=noise_pred, features=features):
            return OVERHEAD + sum(values.nbytes for values in (noise_pred, *features.values()))
        case Embedded(prompt_embeds=prompt_embeds, dropped=dropped):
            return OVERHEAD + prompt_embeds.nbytes + len(dropped)
        case _:
            return OVERHEAD + int(answer.nbytes)


def _rank(row: WaitingRow) -> tuple[int, float, int, int]:
    return (-row.priority, row.due, row.job, row.index)
