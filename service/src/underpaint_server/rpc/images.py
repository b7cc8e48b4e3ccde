"""Encoded pictures: what they are, whether they are harmless, their pixels, and back.

Bytes come from strangers. The type is read from the first bytes, the size from the header, and nothing is decoded
before both were found acceptable. Everything here is blocking work for a thread.
"""

import io
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageOps
from underpaint.v1 import types_pb2

from underpaint_server.errors import FieldInvalid, FieldViolation, ImageTooLarge, ImageUndecodable
from underpaint_server.jobs import Picture
from underpaint_server.rpc.fitting import Fitting, fit_mask

PNG: Final = "image/png"
JPEG: Final = "image/jpeg"
WEBP: Final = "image/webp"

_FORMATS: Final = {PNG: "PNG", JPEG: "JPEG", WEBP: "WEBP"}
MEDIA_TYPES: Final = tuple(_FORMATS)
_SAVING: Final[dict[str, dict[str, int | bool]]] = {
    PNG: {"compress_level": 6},
    JPEG: {"quality": 95, "subsampling": 0},
    WEBP: {"lossless": True, "quality": 80, "method": 4},
}
_PREVIEW_GROWTH: Final = 4

# Pillow's own limit is global and only warns up to twice its value; ours is checked on every header, before decoding.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What is decoded at all."""

    max_bytes: int
    max_pixels: int


def sniff(content: bytes) -> str:
    """The media type that the first bytes show, ``""`` for anything but PNG, JPEG and WebP."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if content.startswith(b"\xff\xd8\xff"):
        return JPEG
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return WEBP
    return ""


def decode(image: types_pb2.Image, limits: ImageLimits, what: str = "the image") -> Image.Image:
    """The picture upright, in whatever mode it was encoded in.

    Raises ImageUndecodable and ImageTooLarge, with ``what`` naming the picture in their messages.
    """
    kind = _check_bytes(image, limits, what)
    try:
        opened = Image.open(io.BytesIO(image.content), formats=(_FORMATS[kind],))
        _check_pixels(opened, limits, what)
        opened.load()
        return ImageOps.exif_transpose(opened)
    except ImageTooLarge:
        raise
    except Exception as error:  # decoders raise all kinds of errors on broken bytes
        raise ImageUndecodable(f"{what} does not decode as {kind}: {error}") from error


def rgb(image: Image.Image) -> Image.Image:
    """Eight bits of red, green and blue; transparency is put on white."""
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey to 8 bits, not scale it.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def decode_mask(image: types_pb2.Image, limits: ImageLimits, fitting: Fitting, path: str) -> Picture:
    """The mask (height, width), 0 or 255, at the fitted size.

    It must have the source picture's size, and is then fitted as that was, or the fitted size already; else
    FieldInvalid at ``path``.
    """
    mask = decode(image, limits, "the mask")
    if mask.has_transparency_data or mask.mode not in ("1", "L", "P", "RGB"):
        raise FieldInvalid(FieldViolation(path, f"an opaque 8-bit grey picture is wanted, this one is {mask.mode}"))
    grey = mask.convert("L")
    if grey.size == fitting.size:
        return np.where(np.asarray(grey) >= 128, np.uint8(255), np.uint8(0))
    if grey.size == fitting.source_size:
        return fit_mask(grey, fitting)
    raise FieldInvalid(FieldViolation(path, _mask_sizes(grey, fitting)))


def encode(pixels: Picture, media_type: str = PNG) -> types_pb2.Image:
    """A picture (height, width, 3) or mask (height, width) as bytes; the same pixels always give the same bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, _FORMATS[media_type], **_SAVING[media_type])
    return types_pb2.Image(content=out.getvalue(), media_type=media_type)


def encode_preview(pixels: Picture, longest_px: int) -> types_pb2.Image:
    """A JPEG whose longest side is ``longest_px``, or four times the picture's if that is less."""
    image = Image.fromarray(pixels)
    scale = min(longest_px / max(image.size), _PREVIEW_GROWTH)
    width, height = (max(1, round(side * scale)) for side in image.size)
    out = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(out, "JPEG", quality=80)
    return types_pb2.Image(content=out.getvalue(), media_type=JPEG)


def _check_bytes(image: types_pb2.Image, limits: ImageLimits, what: str) -> str:
    if len(image.content) > limits.max_bytes:
        raise _too_large(what, "bytes", limits.max_bytes, len(image.content))
    kind = sniff(image.content)
    if not kind:
        raise ImageUndecodable(f"{what} is neither PNG, JPEG nor WebP ({len(image.content)} bytes)")
    if image.media_type and image.media_type != kind:
        raise ImageUndecodable(f"{what} is declared as {image.media_type} but its bytes are {kind}")
    return kind


def _check_pixels(opened: Image.Image, limits: ImageLimits, what: str) -> None:
    pixels = opened.width * opened.height
    if pixels == 0:
        raise ValueError("it has no pixels")
    if pixels > limits.max_pixels:
        raise _too_large(what, "pixels", limits.max_pixels, pixels)


def _too_large(what: str, unit: str, limit: int, actual: int) -> ImageTooLarge:
    message = f"{what} has {actual} {unit}, the limit is {limit}"
    return ImageTooLarge(message, metadata={"unit": unit, "limit": str(limit), "actual": str(actual)})


def _mask_sizes(mask: Image.Image, fitting: Fitting) -> str:
    allowed = {f"{w}x{h}": None for w, h in (fitting.source_size, fitting.size)}
    return f"the mask has {mask.width}x{mask.height} pixels, the image {' as received, or '.join(allowed)}"
