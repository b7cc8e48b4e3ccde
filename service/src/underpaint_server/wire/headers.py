"""What the first bytes of an image say, and the limits that are checked by it. Needs no library for images."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from underpaint_server.errors import ImageTooLarge, ImageUndecodable

PNG: Final = "image/png"
JPEG: Final = "image/jpeg"
WEBP: Final = "image/webp"

IMAGE: Final = "the image"
MASK: Final = "the mask"

_SEGMENTS_BEFORE_SIZE: Final = 1024
"""Most segments of a JPEG before the one that has its size. A profile and metadata of 16 MiB take 256."""
_BETWEEN_SEGMENTS: Final = 65536
"""Most bytes before a segment that belong to none."""
_MARKER: Final = re.compile(rb"\xff([\x01-\xfe])")
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xD9)})
_SCAN_OR_END: Final = (0xDA, 0xD9)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The largest image that is decoded."""

    max_bytes: int
    """Size of the encoded image."""
    max_pixels: int
    """Width times height."""
    max_aspect: float
    """The longer side divided by the shorter one."""

    def check(self, width: int, height: int, what: str) -> None:
        """Raise ImageTooLarge or, for an image without pixels, ImageUndecodable; ``what`` names it in the message."""
        if width < 1 or height < 1:
            raise ImageUndecodable(f"{what} has no pixels")
        pixels, aspect = width * height, max(width, height) / min(width, height)
        if pixels > self.max_pixels:
            raise too_large(f"{what} has {pixels} pixels", "pixels", self.max_pixels, pixels)
        if aspect > self.max_aspect:
            text = f"{what} has {width}x{height} pixels, and one side is {aspect:.1f} times as long as the other"
            raise too_large(text, "aspect ratio", self.max_aspect, f"{aspect:.1f}")


@dataclass(frozen=True, slots=True)
class Header:
    """Type and size of an encoded image, as its first bytes say."""

    kind: str
    """The media type."""
    width: int
    """In pixels, before EXIF orientation."""
    height: int
    """In pixels."""

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.width * self.height


def sniff(content: bytes) -> str:
    """The media type by the first bytes; ``""`` for anything but PNG, JPEG and WebP."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if content.startswith(b"\xff\xd8\xff"):
        return JPEG
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return WEBP
    return ""


def read_header(content: bytes, limits: ImageLimits, what: str) -> Header:
    """Read type and size, and check them.

    Raises ImageUndecodable and ImageTooLarge; ``what`` names the image in their messages.
    """
    if len(content) > limits.max_bytes:
        raise too_large(f"{what} has {len(content)} bytes", "bytes", limits.max_bytes, len(content))
    kind = sniff(content)
    if not kind:
        raise ImageUndecodable(f"{what} is neither PNG, JPEG nor WebP ({len(content)} bytes)")
    size = _SIZES[kind](content, what)
    if size is None:
        raise ImageUndecodable(f"{what} cannot be decoded as {kind}: its header is damaged")
    limits.check(*size, what)
    return Header(kind, *size)


def too_large(text: str, unit: str, limit: float, actual: object) -> ImageTooLarge:
    """The error for an image that has ``actual`` of the ``unit``, as the text says, and may have ``limit``."""
    metadata = {"unit": unit, "limit": f"{limit:.12g}", "actual": str(actual)}
    return ImageTooLarge(f"{text}; the limit is {limit:.12g}", metadata=metadata)


Size = tuple[int, int] | None
"""(width, height) in pixels; None if it cannot be read."""


def _png(content: bytes, _what: str) -> Size:
    if content[12:16] != b"IHDR" or len(content) < 24:
        return None
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


def _jpeg(content: bytes, what: str) -> Size:
    position = 2
    for _ in range(_SEGMENTS_BEFORE_SIZE):
        # What stands between two segments is skipped, as libraries do.
        match = _MARKER.search(content, position, position + _BETWEEN_SEGMENTS)
        if match is None or match[1][0] in _SCAN_OR_END:
            return None
        marker, position = match[1][0], match.end()
        if marker in _FRAMES:
            height, width = content[position + 3 : position + 5], content[position + 5 : position + 7]
            return (int.from_bytes(width), int.from_bytes(height)) if len(width) == 2 else None
        if marker not in _WITHOUT_LENGTH:
            position += int.from_bytes(content[position : position + 2])
    limit = _SEGMENTS_BEFORE_SIZE
    raise too_large(f"{what} has too many segments before its size", "segments", limit, f"more than {limit}")


def _webp(content: bytes, _what: str) -> Size:
    kind, data = content[12:16], content[20:30]
    if len(data) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[4:7], "little"), 1 + int.from_bytes(data[7:10], "little")
    if kind == b"VP8L" and data[0] == 0x2F:
        bits = int.from_bytes(data[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and data[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF
    return None


_SIZES: Final[dict[str, Callable[[bytes, str], Size]]] = {PNG: _png, JPEG: _jpeg, WEBP: _webp}
