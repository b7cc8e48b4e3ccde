"""From the bytes of an image to pixels that the model can work on, and from those of a mask to the mask.

The bytes are not trusted: whatever a library raises for them is IMAGE_UNDECODABLE.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from underpaint_server.decoder import structure
from underpaint_server.errors import FieldInvalid, FieldViolation, ImageUndecodable, UnderpaintError
from underpaint_server.jobs import Picture
from underpaint_server.wire.fitting import Fitting, fit_mask
from underpaint_server.wire.headers import JPEG, PNG, WEBP, ImageLimits

FORMATS: Final = {PNG: "PNG", JPEG: "JPEG", WEBP: "WEBP"}
"""Media type -> Pillow's name."""

_ADDRESS: Final = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")
_XMP: Final = ("xmp", "XML:com.adobe.xmp")
_TO_EIGHT_BITS: Final = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
"""Pillow's name of a PNG's pixels -> factor from the file's values to those that Pillow decodes them to."""

# Pillow's own limit is global, and up to twice its value it only warns. Here every header is checked before decoding.
Image.MAX_IMAGE_PIXELS = None


def load(content: bytes, kind: str, limits: ImageLimits, what: str) -> Image.Image:
    """Decode an image of this media type, in the mode it was encoded in, with its EXIF orientation applied.

    Raises ImageUndecodable and ImageTooLarge; ``what`` names the image in their messages.
    """
    structure.check(content, kind, what)
    with decoding(what, kind):
        image = Image.open(io.BytesIO(content), formats=(FORMATS[kind],))
        limits.check(*image.size, what)
        _check_frames(image, what)
        _scale_transparency(image)
        image.load()
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """The image with its EXIF orientation applied; changes the image. One in XMP is no EXIF, and is left alone."""
    for key in _XMP:
        image.info.pop(key, None)
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # a damaged EXIF block is ignored: the pixels are good
        return image
    return image


def rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB: to sRGB if the image has a colour profile. Transparent parts are blended with white.
    Changes the image.

    Needs memory for at most one more image of that size and two masks.
    """
    profile = image.info.get("icc_profile")
    transparency = ImageChops.invert(_alpha(image)) if image.has_transparency_data else None
    image.info.pop("transparency", None)  # Pillow would warn that the colours lose it
    colours = _opaque(_eight_bits(image))
    if profile:
        colours = _to_srgb(colours, profile)
    if colours.mode != "RGB":
        colours = colours.convert("RGB")
    if transparency is not None:
        colours.paste("white", mask=transparency)
    return colours


def mask(image: Image.Image, fitting: Fitting, path: str) -> Picture:
    """The mask (height, width) uint8, 0 or 255, at the fitted size, of a decoded image.

    A mask of the source image's size is fitted as that image was; a mask of the fitted size is used as it is. Raises
    FieldInvalid at ``path`` for another size or mode.
    """
    if image.has_transparency_data or image.mode not in ("1", "L", "P", "RGB"):
        raise FieldInvalid(FieldViolation(path, f"must be an opaque 8-bit grey image; this one has mode {image.mode}"))
    grey = image.convert("L")
    if grey.size == fitting.size:
        return np.where(np.asarray(grey) >= 128, np.uint8(255), np.uint8(0))
    if grey.size == fitting.source_size:
        return fit_mask(grey, fitting)
    raise FieldInvalid(FieldViolation(path, _mask_sizes(grey, fitting)))


@contextmanager
def decoding(what: str, kind: str) -> Iterator[None]:
    """Turn any error that a library raises for the image's bytes into ImageUndecodable; running out of memory is not
    the bytes' fault alone, and is raised as it is."""
    try:
        yield
    except (UnderpaintError, MemoryError):
        raise
    except Exception as error:  # decoders raise many types of errors for malformed bytes
        raise ImageUndecodable(f"{what} cannot be decoded as {kind}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What is wrong with the bytes, in the library's words if those say it to a caller."""
    if isinstance(error, UnidentifiedImageError) or not str(error):
        return "it is damaged"
    return _ADDRESS.sub("the file", str(error))


def _check_frames(image: Image.Image, what: str) -> None:
    # The further images of an MPO are views and maps that belong to the first, which every program shows alone.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise ImageUndecodable(f"{what} is an animation of {frames} frames; send one of them as an image of its own")


def _scale_transparency(image: Image.Image) -> None:
    """Bring the transparent colour of a PNG to the values that its pixels are decoded to, which Pillow does not."""
    colour = image.info.get("transparency")
    if not isinstance(image, PngImageFile) or image.mode == "P" or colour is None or not image.tile:
        return
    name = str(image.tile[0][3])
    factor, limit = _TO_EIGHT_BITS.get(name, 1), 0xFFFF if "16" in name else 0xFF
    values = [int((value & limit) * factor) for value in (colour if isinstance(colour, tuple) else (colour,))]
    image.info["transparency"] = tuple(values) if isinstance(colour, tuple) else values[0]


def _eight_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I"):
        return image
    # Pillow would clip 16-bit grey to 8 bits instead of scaling it.
    return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))


def _alpha(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would compare after clipping to 8 bits
        transparent = np.asarray(image) == image.info["transparency"]
        return Image.fromarray(np.where(transparent, np.uint8(0), np.uint8(255)))
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
    except MemoryError:
        raise
    except Exception:  # the profile is not trusted either
        return image
    return converted or image


def _mask_sizes(image: Image.Image, fitting: Fitting) -> str:
    allowed = {f"{w}x{h}": None for w, h in (fitting.source_size, fitting.size)}
    return f"the mask has {image.width}x{image.height} pixels; the image has {' as received, or '.join(allowed)}"
