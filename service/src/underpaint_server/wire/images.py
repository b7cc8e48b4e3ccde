"""Encoded pictures: what they are, whether they are harmless, their pixels, and back.

Bytes come from strangers. The type is read from the first bytes, the size from the header, and nothing is decoded
before both were found acceptable. Everything here is blocking work for a thread.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps
from underpaint.v1 import types_pb2

from underpaint_server.errors import FieldInvalid, FieldViolation, ImageTooLarge, ImageUndecodable
from underpaint_server.jobs import Picture
from underpaint_server.wire.fitting import Fitting, fit_mask

PNG: Final = "image/png"
JPEG: Final = "image/jpeg"
WEBP: Final = "image/webp"

IMAGE: Final = "the image"
MASK: Final = "the mask"

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


def examine(image: types_pb2.Image, limits: ImageLimits, what: str = IMAGE) -> Image.Image:
    """The picture by its header: type and size are known and acceptable, pixels come with :func:`load`.

    Raises ImageUndecodable and ImageTooLarge, with ``what`` naming the picture in their messages.
    """
    kind = _check_bytes(image, limits, what)
    with _decoding(what, kind):
        opened = Image.open(io.BytesIO(image.content), formats=(_FORMATS[kind],))
        _check_pixels(opened, limits, what)
        return opened


def load(opened: Image.Image, what: str = IMAGE) -> Image.Image:
    """An examined picture with its pixels, upright, in whatever mode it was encoded in. Raises ImageUndecodable."""
    with _decoding(what, Image.MIME.get(opened.format or "", "a picture")):
        opened.load()
    with suppress(Exception):  # what cannot be read of the EXIF block says nothing, least of all against the pixels
        ImageOps.exif_transpose(opened, in_place=True)
    return opened


def rgb(image: Image.Image) -> Image.Image:
    """Eight bits of red, green and blue: sRGB if the picture has a colour profile. Transparency is put on white.

    Holds one more picture of that size at most, and two masks.
    """
    profile = image.info.get("icc_profile")
    image = _eight_bits(image)
    beyond = ImageChops.invert(_alpha(image)) if image.has_transparency_data else None
    colours = _opaque(image)
    if profile:
        colours = _to_srgb(colours, profile)
    if colours.mode != "RGB":
        colours = colours.convert("RGB")
    if beyond is not None:
        colours.paste("white", mask=beyond)
    return colours


def decode_mask(opened: Image.Image, fitting: Fitting, path: str) -> Picture:
    """The examined mask (height, width), 0 or 255, at the fitted size.

    It must have the source picture's size, and is then fitted as that was, or the fitted size already; else
    FieldInvalid at ``path``. Raises ImageUndecodable.
    """
    mask = load(opened, MASK)
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


@contextmanager
def _decoding(what: str, kind: str) -> Iterator[None]:
    try:
        yield
    except ImageTooLarge:
        raise
    except Exception as error:  # decoders raise all kinds of errors on broken bytes
        raise ImageUndecodable(f"{what} does not decode as {kind}: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I"):
        return image
    # Pillow would clip 16-bit grey to 8 bits, not scale it.
    return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))


def _alpha(image: Image.Image) -> Image.Image:
    return (image if image.mode in ("RGBA", "LA") else image.convert("RGBA")).getchannel("A")


def _opaque(image: Image.Image) -> Image.Image:
    """The colours alone, in a mode that colour profiles know."""
    if image.mode in ("RGB", "L", "CMYK"):
        return image
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The colours that a profile means; the same ones if it is broken, or not one for pictures of this kind."""
    try:
        meant = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, meant, srgb, outputMode="RGB", inPlace=image.mode == "RGB")
    except Exception:  # strangers' bytes again
        return image
    return converted or image


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
