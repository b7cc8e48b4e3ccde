"""The in-memory index of stored inversions, in the order of last use. It does no input or output."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from underpaint_server.stores.inversions.files import Stat
from underpaint_server.stores.inversions.record import Record


@dataclass(slots=True)
class IndexEntry:
    """One stored inversion."""

    record: Record
    stat: Stat
    """The object as last read."""
    used_at: float
    """Unix time in seconds of the last known use, by this replica or another."""
    on_record_at: float
    """Unix time in seconds of the last use recorded in the object store, where other replicas can read it."""


class Index:
    """Entries by name, least recently used first, and the sum of their sizes."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, IndexEntry] = OrderedDict()
        self.total_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def get(self, name: str) -> IndexEntry | None:
        """The entry, or None."""
        return self._entries.get(name)

    def items(self) -> Iterable[tuple[str, IndexEntry]]:
        """All entries, least recently used first."""
        return self._entries.items()

    def oldest(self) -> tuple[str, IndexEntry] | None:
        """The least recently used entry and its name; None if the index is empty."""
        return next(iter(self._entries.items()), None)

    def put(self, name: str, record: Record, stat: Stat) -> IndexEntry:
        """Add an entry, or replace it without changing its position; of two last uses the later one is kept."""
        previous = self._entries.get(name)
        self.total_bytes += stat.size_bytes - (previous.stat.size_bytes if previous else 0)
        used_at = max(stat.used_at, previous.used_at if previous else 0.0)
        on_record_at = max(stat.used_at, previous.on_record_at if previous else 0.0)
        self._entries[name] = IndexEntry(record, stat, used_at, on_record_at)
        return self._entries[name]

    def drop(self, name: str) -> IndexEntry | None:
        """Remove an entry from the index and return it; None if there was none."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            self.total_bytes -= entry.stat.size_bytes
        return entry

    def use(self, name: str, at: float) -> None:
        """Note a use at Unix time ``at``, and move the entry to the end."""
        entry = self._entries.get(name)
        if entry is not None:
            entry.used_at = max(entry.used_at, at)
            self._entries.move_to_end(name)

    def learn_uses(self, stats: Mapping[str, Stat]) -> None:
        """Note the last uses that other replicas recorded, and sort the entries by last use again."""
        for name, stat in stats.items():
            entry = self._entries.get(name)
            if entry is not None:
                entry.used_at = max(entry.used_at, stat.used_at)
                entry.on_record_at = max(entry.on_record_at, stat.used_at)
        self._entries = OrderedDict(sorted(self._entries.items(), key=lambda item: item[1].used_at))
