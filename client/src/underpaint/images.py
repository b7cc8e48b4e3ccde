"""Images: to encoded bytes for a request, to ``PIL.Image`` from an answer.

Files and bytes are sent unchanged, without decoding. Pillow is imported only to decode or to encode an image.
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

_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_MEDIA_TYPES = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}


def encoded(image: ImageLike) -> bytes:
    """The bytes to send for an image: those of the file, the bytes themselves, or a PNG of the Pillow image.

    Raises OSError when a file cannot be read, TypeError for a value of another type.
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
    from PIL import ImageOps

    # Pillow does not write EXIF orientation to PNG files, so the pixels are turned instead.
    upright = ImageOps.exif_transpose(image)
    if upright.mode not in _PNG_MODES:
        upright = upright.convert("RGB")
    buffer = io.BytesIO()
    upright.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
