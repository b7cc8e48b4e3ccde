"""Decoding and encoding of images, and the checks before decoding.

Uploaded bytes are not trusted. The type is read from the first bytes and the size from the header; pixels are decoded
only if both are accepted. All functions block and belong on a thread.
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
_MAX_PREVIEW_SCALE: Final = 4

# Pillow's own limit is global, and up to twice its value it only warns. Here every header is checked before decoding.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The largest image that is decoded."""

    max_bytes: int
    """Size of the encoded image."""
    max_pixels: int
    """Width times height."""


def sniff(content: bytes) -> str:
    """The media type by the first bytes; ``""`` for anything but PNG, JPEG and WebP."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if content.startswith(b"\xff\xd8\xff"):
        return JPEG
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return WEBP
    return ""


def examine(image: types_pb2.Image, limits: ImageLimits, what: str = IMAGE) -> Image.Image:
    """Check the type and size of an image by its header; :func:`load` decodes its pixels.

    Raises ImageUndecodable and ImageTooLarge; ``what`` names the image in their messages.
    """
    kind = _check_bytes(image, limits, what)
    with _decoding(what, kind):
        opened = Image.open(io.BytesIO(image.content), formats=(_FORMATS[kind],))
        _check_pixels(opened, limits, what)
        return opened


def load(opened: Image.Image, what: str = IMAGE) -> Image.Image:
    """Decode an examined image, in the mode it was encoded in, with its EXIF orientation applied.

    Raises ImageUndecodable.
    """
    with _decoding(what, Image.MIME.get(opened.format or "", "an image")):
        opened.load()
    with suppress(Exception):  # a damaged EXIF block is ignored: the pixels are good
        ImageOps.exif_transpose(opened, in_place=True)
    return opened


def rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB: to sRGB if the image has a colour profile. Transparent parts are blended with white.

    Needs memory for at most one more image of that size and two masks.
    """
    profile = image.info.get("icc_profile")
    image = _eight_bits(image)
    transparency = ImageChops.invert(_alpha(image)) if image.has_transparency_data else None
    colours = _opaque(image)
    if profile:
        colours = _to_srgb(colours, profile)
    if colours.mode != "RGB":
        colours = colours.convert("RGB")
    if transparency is not None:
        colours.paste("white", mask=transparency)
    return colours


def decode_mask(opened: Image.Image, fitting: Fitting, path: str) -> Picture:
    """Decode an examined mask to (height, width) uint8, 0 or 255, at the fitted size.

    A mask of the source image's size is fitted as that image was; a mask of the fitted size is used as it is. Raises
    FieldInvalid at ``path`` for another size or mode, and ImageUndecodable.
    """
    mask = load(opened, MASK)
    if mask.has_transparency_data or mask.mode not in ("1", "L", "P", "RGB"):
        raise FieldInvalid(FieldViolation(path, f"must be an opaque 8-bit grey image; this one has mode {mask.mode}"))
    grey = mask.convert("L")
    if grey.size == fitting.size:
        return np.where(np.asarray(grey) >= 128, np.uint8(255), np.uint8(0))
    if grey.size == fitting.source_size:
        return fit_mask(grey, fitting)
    raise FieldInvalid(FieldViolation(path, _mask_sizes(grey, fitting)))


def encode(pixels: Picture, media_type: str = PNG) -> types_pb2.Image:
    """Encode an image (height, width, 3) or mask (height, width) of uint8; equal pixels give equal bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, _FORMATS[media_type], **_SAVING[media_type])
    return types_pb2.Image(content=out.getvalue(), media_type=media_type)


def encode_preview(pixels: Picture, longest_px: int) -> types_pb2.Image:
    """A JPEG whose longest side is ``longest_px``, but at most four times that of the preview's own pixels."""
    image = Image.fromarray(pixels)
    scale = min(longest_px / max(image.size), _MAX_PREVIEW_SCALE)
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
    except Exception as error:  # decoders raise many types of errors for malformed bytes
        raise ImageUndecodable(f"{what} cannot be decoded as {kind}: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I"):
        return image
    # Pillow would clip 16-bit grey to 8 bits instead of scaling it.
    return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))


def _alpha(image: Image.Image) -> Image.Image:
    return (image if image.mode in ("RGBA", "LA") else image.convert("RGBA")).getchannel("A")


def _opaque(image: Image.Image) -> Image.Image:
    """The image without transparency, in a mode that colour profiles can be applied to."""
    if image.mode in ("RGB", "L", "CMYK"):
        return image
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert from a colour profile to sRGB; unchanged if the profile is damaged or not for images of this mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB", inPlace=image.mode == "RGB")
    except Exception:  # the profile is not trusted either
        return image
    return converted or image


def _check_bytes(image: types_pb2.Image, limits: ImageLimits, what: str) -> str:
    if len(image.content) > limits.max_bytes:
        raise _too_large(what, "bytes", limits.max_bytes, len(image.content))
    kind = sniff(image.content)
    if not kind:
        raise ImageUndecodable(f"{what} is neither PNG, JPEG nor WebP ({len(image.content)} bytes)")
    if image.media_type and image.media_type != kind:
        raise ImageUndecodable(f"{what} is declared as {image.media_type}, but its bytes are {kind}")
    return kind


def _check_pixels(opened: Image.Image, limits: ImageLimits, what: str) -> None:
    pixels = opened.width * opened.height
    if pixels == 0:
        raise ValueError("it has no pixels")
    if pixels > limits.max_pixels:
        raise _too_large(what, "pixels", limits.max_pixels, pixels)


def _too_large(what: str, unit: str, limit: int, actual: int) -> ImageTooLarge:
    message = f"{what} has {actual} {unit}; the limit is {limit}"
    return ImageTooLarge(message, metadata={"unit": unit, "limit": str(limit), "actual": str(actual)})


def _mask_sizes(mask: Image.Image, fitting: Fitting) -> str:
    allowed = {f"{w}x{h}": None for w, h in (fitting.source_size, fitting.size)}
    return f"the mask has {mask.width}x{mask.height} pixels; the image has {' as received, or '.join(allowed)}"
