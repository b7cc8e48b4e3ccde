"""Limits on what a file is made of, checked before a library reads it.

Each part of a file costs time or memory, however small it is: a JPEG of a megabyte has room for thirty thousand passes
over all its pixels.
"""

import re
from collections.abc import Callable, Iterator
from typing import Final

from underpaint_server.wire.headers import JPEG, PNG, WEBP, too_large

MAX_SCANS: Final = 100
"""Most scans of a JPEG. Progressive ones have about ten."""
MAX_SEGMENTS: Final = 4096
"""Most segments of a JPEG. A profile or a depth map of 16 MiB takes 256."""
MAX_CHUNKS: Final = 65536
"""Most chunks of a PNG or WebP. A PNG of 16 MiB, in the usual chunks of 8 KiB, has 2048."""

_BETWEEN_SEGMENTS: Final = 65536
"""Most bytes before the first scan that belong to no segment; Pillow reads them one by one."""
_MARKER: Final = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
"""A marker that is neither a zero byte of the pixels' data nor a restart."""
_SCAN: Final = 0xDA
_END: Final = 0xD9
_WITHOUT_LENGTH: Final = (0x01, 0xD8)


def check(content: bytes, kind: str, what: str) -> None:
    """Raise ImageTooLarge for a file of this media type that has too many parts; ``what`` names it in the message."""
    for unit, limit, actual in _COUNTS[kind](content):
        if actual > limit:
            raise too_large(f"{what} has too many {unit}", unit, limit, f"more than {limit}")


Counts = Iterator[tuple[str, int, int]]
"""Unit, limit and the count so far; counting goes on only while the consumer asks."""


def _jpeg(content: bytes) -> Counts:
    position, segments, scans = 2, 0, 0
    while (match := _MARKER.search(content, position)) is not None and match[1][0] != _END:
        if not scans:
            yield "bytes between its segments", _BETWEEN_SEGMENTS, match.start() - position
        marker, position = match[1][0], match.end()
        if marker not in _WITHOUT_LENGTH:
            position += int.from_bytes(content[position : position + 2])
        segments, scans = segments + 1, scans + (marker == _SCAN)
        yield "scans", MAX_SCANS, scans
        yield "segments", MAX_SEGMENTS, segments


def _png(content: bytes) -> Counts:
    position, chunks = 8, 0
    while position + 8 <= len(content):
        position += 12 + int.from_bytes(content[position : position + 4])
        chunks += 1
        yield "chunks", MAX_CHUNKS, chunks


def _webp(content: bytes) -> Counts:
    position, chunks = 12, 0
    while position + 8 <= len(content):
        size = int.from_bytes(content[position + 4 : position + 8], "little")
        position += 8 + size + size % 2
        chunks += 1
        yield "chunks", MAX_CHUNKS, chunks


_COUNTS: Final[dict[str, Callable[[bytes], Counts]]] = {PNG: _png, JPEG: _jpeg, WEBP: _webp}
