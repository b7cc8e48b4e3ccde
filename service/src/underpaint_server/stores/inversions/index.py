"""What the store knows without asking: one record an entry, in the order of last use. Pure bookkeeping, no waiting."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from underpaint_server.stores.inversions.files import Stat
from underpaint_server.stores.inversions.record import Record


@dataclass(slots=True)
class IndexEntry:
    """One entry."""

    record: Record
    stat: Stat
    """The object as last seen."""
    used_at: float
    """Unix time of the last use that anyone is known to have made of it."""
    on_record_at: float
    """Unix time of the last use that all replicas can know of."""


class Index:
    """Entries by name, least recently used first; their bytes summed."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, IndexEntry] = OrderedDict()
        self.total_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def get(self, name: str) -> IndexEntry | None:
        """The entry, or None."""
        return self._kept.get(name)

    def items(self) -> Iterable[tuple[str, IndexEntry]]:
        """All entries, least recently used first."""
        return self._kept.items()

    def oldest(self) -> tuple[str, IndexEntry] | None:
        """The least recently used entry."""
        return next(iter(self._kept.items()), None)

    def put(self, name: str, record: Record, stat: Stat) -> IndexEntry:
        """Add an entry, or replace it in its place; a use that was known already is not forgotten."""
        before = self._kept.get(name)
        self.total_bytes += stat.size_bytes - (before.stat.size_bytes if before else 0)
        used_at = max(stat.used_at, before.used_at if before else 0.0)
        on_record_at = max(stat.used_at, before.on_record_at if before else 0.0)
        self._kept[name] = IndexEntry(record, stat, used_at, on_record_at)
        return self._kept[name]

    def drop(self, name: str) -> IndexEntry | None:
        """Forget an entry; None if there was none."""
        kept = self._kept.pop(name, None)
        if kept is not None:
            self.total_bytes -= kept.stat.size_bytes
        return kept

    def use(self, name: str, at: float) -> None:
        """Somebody used it then."""
        kept = self._kept.get(name)
        if kept is not None:
            kept.used_at = max(kept.used_at, at)
            self._kept.move_to_end(name)

    def learn_uses(self, stats: Mapping[str, Stat]) -> None:
        """Take over uses that other replicas made, and put the order right."""
        for name, stat in stats.items():
            kept = self._kept.get(name)
            if kept is not None:
                kept.used_at = max(kept.used_at, stat.used_at)
                kept.on_record_at = max(kept.on_record_at, stat.used_at)
        self._kept = OrderedDict(sorted(self._kept.items(), key=lambda item: item[1].used_at))
