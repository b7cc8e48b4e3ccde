"""Pictures at the border: to encoded bytes on the way out, to ``PIL.Image`` on the way in.

Files and bytes travel as they are, never decoded and encoded again. Pillow is imported when a picture is first touched.
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
    ImageLike = object

_AS_THEY_ARE = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_MEDIA_TYPES = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}


def encoded(image: ImageLike) -> bytes:
    """The bytes to send for a picture.

    Raises OSError when a path cannot be read, TypeError for anything that is no picture.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    from PIL import Image

    if isinstance(image, Image.Image):
        return _png(image)
    raise TypeError(f"a picture is a path, bytes or a PIL.Image, not {type(image).__name__}")


def decoded(content: bytes) -> "Image.Image":
    """Decode PNG, JPEG or WebP bytes, fully."""
    from PIL import Image

    picture = Image.open(io.BytesIO(content))
    picture.load()
    return picture


def save(content: bytes, media_type: str, path: str | os.PathLike[str]) -> Path:
    """Write a picture where ``path`` says: the very bytes when its suffix agrees with the type, else encoded anew.

    Raises ValueError for a suffix other than .png, .jpg, .jpeg and .webp.
    """
    target = Path(path)
    wanted = _FORMATS.get(target.suffix.lower())
    if wanted is None:
        raise ValueError(f"{target}: name it {', '.join(_FORMATS)}")
    if wanted == _MEDIA_TYPES.get(media_type):
        target.write_bytes(content)
    else:
        decoded(content).save(target, wanted)
    return target


def media_type_of(path: str | os.PathLike[str]) -> str:
    """Media type that a file name asks for; ValueError for a suffix that no answer can have."""
    wanted = _FORMATS.get(Path(path).suffix.lower())
    for media_type, name in _MEDIA_TYPES.items():
        if name == wanted:
            return media_type
    raise ValueError(f"{path}: name it {', '.join(_FORMATS)}")


def _png(image: "Image.Image") -> bytes:
    from PIL import ImageOps

    # PNG files written by Pillow lose the EXIF orientation, so what the viewer would turn is turned here.
    upright = ImageOps.exif_transpose(image)
    if upright.mode not in _AS_THEY_ARE:
        upright = upright.convert("RGB")
    buffer = io.BytesIO()
    upright.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
