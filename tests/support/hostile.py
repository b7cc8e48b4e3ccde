"""Picture files that are made to cost whoever decodes them: much time or memory for few bytes."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Final

from PIL import Image

PNG_MAGIC: Final = b"\x89PNG\r\n\x1a\n"


def png_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    return PNG_MAGIC + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def png(width: int, height: int, *extra: bytes, depth: int = 8, colour: int = 0, rows: bytes | None = None) -> bytes:
    """A PNG of ``rows``, each after its filter byte; all zero if None. ``extra`` chunks come before the pixels."""
    if rows is None:
        channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        rows = bytes(((width * channels * depth + 7) // 8 + 1) * height)
    pixels = png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"".join((png_header(width, height, depth, colour), *extra, pixels, png_chunk(b"IEND")))


def jpeg_segment(marker: int, data: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def with_segments(content: bytes, *segments: bytes) -> bytes:
    """A JPEG with more segments after its start."""
    return content[:2] + b"".join(segments) + content[2:]


def jpeg(size: tuple[int, int] = (64, 48), **options: object) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(out, "JPEG", **options)
    return out.getvalue()


def many_scans(scans: int, width: int = 4096, height: int = 4096) -> bytes:
    """A progressive JPEG whose scans say of all blocks at once that they are empty; each is some thirty bytes."""
    blocks = -(-width // 8) * -(-height // 8)
    bits = "011111111111111" * -(-blocks // 32767)  # the only code of the table, then the length of the run
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\0")
    table = jpeg_segment(0xC4, b"\x10\x01" + bytes(15) + b"\xe0")  # AC table 0: one code of one bit, a run of blocks
    scan = jpeg_segment(0xDA, b"\x01\x01\x00\x01\x3f\x00") + data
    frame = jpeg_segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\x00")
    quantization = jpeg_segment(0xDB, b"\0" + b"\x01" * 64)
    return b"".join((b"\xff\xd8", quantization, frame, table, scan * scans, b"\xff\xd9"))


def exif_of_entries(entries: int, data: int) -> bytes:
    """An EXIF block whose entries all have the same ``data`` bytes as their value."""
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, entries)
    where = 8 + 2 + 12 * entries + 4
    table = b"".join(struct.pack("<HHII", 0x9000 + tag, 7, data, where) for tag in range(entries))
    return head + table + bytes(4 + data)


def exif_in_a_circle() -> bytes:
    """An EXIF block whose sub-directory is the directory itself."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x8769, 4, 1, 8, 8)


def webp(size: tuple[int, int]) -> bytes:
    """A WebP without loss, of one colour."""
    out = io.BytesIO()
    Image.new("RGBA", size, (1, 2, 3, 4)).save(out, "WEBP", lossless=True, quality=0, method=0)
    return out.getvalue()


def webp_chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def webp_header(width: int, height: int) -> bytes:
    """The beginning of a WebP without loss."""
    data = webp_chunk(b"VP8L", b"\x2f" + struct.pack("<I", width - 1 | (height - 1) << 14) + bytes(20))
    return b"RIFF" + struct.pack("<I", 4 + len(data)) + b"WEBP" + data


MIB: Final = 1024 * 1024

FILES: Final[dict[str, Callable[[], bytes]]] = {
    "jpeg of 30 000 scans": lambda: many_scans(30_000),
    "small jpeg of 30 000 scans": lambda: many_scans(30_000, 1024, 1024),
    "png of one column": lambda: png(1, 16_777_216),
    "png of one row": lambda: png(16_777_216, 1),
    "png of one column without data": lambda: png(1, 16_777_216, rows=b""),
    "jpeg of empty comments": lambda: with_segments(jpeg(), jpeg_segment(0xFE) * (4 * MIB - 4096)),
    "jpeg of empty comments behind the frame": lambda: (
        jpeg()[:-2] + jpeg_segment(0xFE) * (4 * MIB - 4096) + b"\xff\xd9"
    ),
    "jpeg of junk": lambda: b"\xff\xd8" + bytes(15 * MIB) + jpeg()[2:],
    "jpeg of fill bytes": lambda: b"\xff\xd8" + b"\xff" * (15 * MIB) + jpeg()[2:],
    "png of empty chunks": lambda: png(64, 48, png_chunk(b"abCd") * 1_300_000),
    "png of empty text": lambda: png(64, 48, png_chunk(b"tEXt", b"a\0b") * 1_000_000),
    "png of packed text": lambda: png(
        64, 48, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1000 * MIB // 10), 9)) * 10
    ),
    "png of packed international text": lambda: png(
        64, 48, *(png_chunk(b"iTXt", b"k%d\0\1\0\0\0" % n + zlib.compress(bytes(1_000_000), 9)) for n in range(200))
    ),
    "png of a packed profile": lambda: png(64, 48, png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200 * MIB), 9))),
    "png of overlapping exif": lambda: png(64, 48, png_chunk(b"eXIf", exif_of_entries(20_000, 700_000)[6:])),
    "png of exif in a circle": lambda: png(64, 48, png_chunk(b"eXIf", exif_in_a_circle()[6:])),
    "jpeg of overlapping exif": lambda: with_segments(jpeg(), jpeg_segment(0xE1, exif_of_entries(4000, 15_000))),
    "jpeg of a huge profile": lambda: with_segments(
        jpeg(), *(jpeg_segment(0xE2, b"ICC_PROFILE\0" + bytes((n, 240)) + bytes(65_000)) for n in range(1, 241))
    ),
    "png of many profiles": lambda: png(
        64, 48, png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(MIB - 1), 9)) * 12_000
    ),
    "webp of 250 megapixels": lambda: webp_header(16_383, 16_000),
    "webp of 24 megapixels": lambda: webp((6000, 4000)),
    "png of 24 megapixels": lambda: png(6000, 4000, colour=6, depth=16),
}
"""Name to a function that makes the file."""
