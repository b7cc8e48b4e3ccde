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
    """Entries by name, least recently used first, and the sum of their sizes.

    Entries of more than ``large_bytes`` are large; those are counted separately too.
    """

    def __init__(self, large_bytes: int) -> None:
        self._entries: OrderedDict[str, IndexEntry] = OrderedDict()
        self._large_bytes = large_bytes
        self.total_bytes = 0
        self.total_large_bytes = 0

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

    def oldest(self, *, large: bool | None = None) -> tuple[str, IndexEntry] | None:
        """The least recently used of all entries, of the large ones or of the others, with its name; None for none."""
        items = self._entries.items()
        return next((item for item in items if large is None or self._is_large(item[1].stat) is large), None)

    @property
    def newest(self) -> str | None:
        """Name of the most recently used entry; None for none."""
        return next(reversed(self._entries), None)

    def _is_large(self, stat: Stat) -> bool:
        return stat.size_bytes > self._large_bytes

    def _count(self, stat: Stat, sign: int) -> None:
        self.total_bytes += sign * stat.size_bytes
        self.total_large_bytes += sign * stat.size_bytes * self._is_large(stat)

    def put(self, name: str, record: Record, stat: Stat) -> IndexEntry:
        """Add an entry, or replace it without changing its position; of two last uses the later one is kept."""
        previous = self._entries.get(name)
        self._count(stat, 1)
        if previous is not None:
            self._count(previous.stat, -1)
        used_at = max(stat.used_at, previous.used_at if previous else 0.0)
        on_record_at = max(stat.used_at, previous.on_record_at if previous else 0.0)
        self._entries[name] = IndexEntry(record, stat, used_at, on_record_at)
        return self._entries[name]

    def drop(self, name: str) -> IndexEntry | None:
        """Remove an entry from the index and return it; None if there was none."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._count(entry.stat, -1)
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
