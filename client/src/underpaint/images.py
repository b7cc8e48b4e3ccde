"""Images: to encoded bytes for a request, to ``PIL.Image`` from an answer.

Files and bytes are sent unchanged, without decoding. A Pillow image is sent as a PNG that means the same: with its
bits, transparency and colour profile, which the server converts as it converts those of a file. Pillow is imported only
to decode or to encode an image.
"""

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    ImageLike = str | os.PathLike[str] | bytes | Image.Image
    """A path, encoded bytes (PNG, JPEG or WebP), or a Pillow image."""
else:
    ImageLike = str | os.PathLike[str] | bytes | object  # Pillow's class would have to be imported

_PNG_MODES = frozenset({"1", "I;16", "L", "LA", "P", "RGB", "RGBA"})
_CONVERTED = {"HSV": "RGB", "LAB": "RGB", "La": "LA", "PA": "RGBA", "RGBX": "RGB", "RGBa": "RGBA", "YCbCr": "RGB"}
"""Modes that PNG lacks -> the mode that holds all that they say."""
_TO_EIGHT_BITS = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
"""Pillow's name of a PNG's pixels -> factor from the file's values to those that Pillow decodes them to."""
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_MEDIA_TYPES = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}


def encoded(image: ImageLike) -> bytes:
    """The bytes to send for an image: those of the file, the bytes themselves, or a PNG of the Pillow image.

    Raises OSError when a file cannot be read, TypeError for a value of another type, ValueError for a Pillow image that
    no PNG can hold: an animation, mode F, more than 16 bits of grey.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    from PIL import Image

    if isinstance(image, Image.Image):
        return _png(image)
    raise TypeError(f"{type(image).__name__} given as an image: pass a path, encoded bytes or a PIL.Image")


def decoded(content: bytes) -> "Image.Image":
    """Decode PNG, JPEG or WebP bytes, pixels included."""
    from PIL import Image

    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def save(content: bytes, media_type: str, path: str | os.PathLike[str]) -> Path:
    """Write an image: its bytes unchanged if the suffix of ``path`` is that of ``media_type``, else encoded again.

    Raises ValueError for a suffix other than .png, .jpg, .jpeg and .webp.
    """
    target = Path(path)
    wanted = _format_of(target)
    if wanted == _MEDIA_TYPES.get(media_type):
        target.write_bytes(content)
    else:
        decoded(content).save(target, wanted)
    return target


def media_type_of(path: str | os.PathLike[str]) -> str:
    """Media type for a file name; ValueError for a suffix other than .png, .jpg, .jpeg and .webp."""
    wanted = _format_of(Path(path))
    return next(media_type for media_type, name in _MEDIA_TYPES.items() if name == wanted)


def _format_of(path: Path) -> str:
    if (name := _FORMATS.get(path.suffix.lower())) is None:
        raise ValueError(f"{path}: the suffix chooses the image format; use one of {', '.join(_FORMATS)}")
    return name


def _png(image: "Image.Image") -> bytes:
    frames = _frames(image)
    if frames > 1:
        raise ValueError(f"the image has {frames} frames: pass one of them, as image.copy() after image.seek(number)")
    transparency = _transparency(image)  # before the pixels are loaded, because Pillow then forgets the file's depth
    upright = _upright(image)
    if transparency is not None:
        upright.info["transparency"] = transparency
    if not _is_colour(upright.info.get("transparency"), upright.mode):
        upright.info.pop("transparency", None)
    buffer = io.BytesIO()
    _png_mode(upright).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _frames(image: "Image.Image") -> int:
    """How many frames an animation has; 1 for a file that was closed, of which only the current one is left."""
    if image.format == "MPO":  # the further images of a camera's file are views and maps that belong to the first
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except ValueError:
        return 1


def _upright(image: "Image.Image") -> "Image.Image":
    """A copy with the EXIF orientation applied to its pixels. One in XMP counts as little as in a file."""
    from PIL import ImageOps

    copy = image.copy()
    for key in ("xmp", "XML:com.adobe.xmp"):
        copy.info.pop(key, None)
    try:
        ImageOps.exif_transpose(copy, in_place=True)
    except Exception:  # a damaged EXIF block is ignored, as in a file
        return copy
    return copy


def _png_mode(image: "Image.Image") -> "Image.Image":
    """The image in a mode that PNG has; raises ValueError where none means the same."""
    mode = image.mode
    if mode in _PNG_MODES:
        return image
    if mode.startswith("I"):
        low, high = (float(str(end)) for end in image.convert("I").getextrema())
        if low < 0 or high > 65535:
            raise ValueError(
                f"the image has mode {mode} and values from {low:.0f} to {high:.0f}: only 16 bits of grey, 0 to 65535,"
                " can be sent; scale the values first"
            )
        return image.convert("I").convert("I;16")
    if mode == "CMYK":
        return _to_srgb(image)
    if mode in _CONVERTED:
        return image.convert(_CONVERTED[mode])
    raise ValueError(
        f"the image has mode {mode}, which says no range of values: scale them to 0 to 255 and convert the image to L"
        " or RGB"
    )


def _to_srgb(image: "Image.Image") -> "Image.Image":
    """A CMYK image by its colour profile, as the server converts a file of it; without one by Pillow's formula."""
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except Exception:  # as in a file, a profile that cannot be read is ignored
        converted = None
    converted = converted or image.convert("RGB")
    converted.info.pop("icc_profile", None)
    return converted


def _is_colour(value: object, mode: str) -> bool:
    """Whether a pixel of this mode can have the value; Pillow's conversions leave a colour of the mode before."""
    match mode:
        case "1":
            return value in (0, 1, 255)
        case "P":
            return isinstance(value, int | bytes)
        case "RGB":
            return isinstance(value, tuple) and len(value) == 3
    return isinstance(value, int) and (mode == "L" or mode.startswith("I"))


def _transparency(image: "Image.Image") -> int | tuple[int, ...] | None:
    """The transparent colour in the values that the pixels have, or will have when they are loaded.

    Pillow keeps the one of a PNG at the file's depth, which only an image that is not loaded yet still has.
    """
    colour, tile = image.info.get("transparency"), getattr(image, "tile", None)
    if image.format != "PNG" or image.mode == "P" or not _is_colour(colour, image.mode):
        return None
    values = colour if isinstance(colour, tuple) else (colour,)
    pixels = str(tile[0][3]) if tile else "RGB;16B" if len(values) == 3 and max(values) > 255 else ""
    scaled = [int(value * _TO_EIGHT_BITS.get(pixels, 1)) for value in values]
    return tuple(scaled) if isinstance(colour, tuple) else scaled[0]
