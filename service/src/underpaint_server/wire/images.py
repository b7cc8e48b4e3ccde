"""What the front process does with images: it reads their headers, and encodes the images of answers.

Uploaded bytes are not trusted. The decoder process reads what follows the header, and only if that was accepted.
"""

import io
from typing import Final

from PIL import Image
from underpaint.v1 import types_pb2

from underpaint_server.errors import ImageUndecodable
from underpaint_server.jobs import Picture
from underpaint_server.wire.headers import IMAGE, JPEG, PNG, WEBP, Header, ImageLimits, read_header

_FORMATS: Final = {PNG: "PNG", JPEG: "JPEG", WEBP: "WEBP"}
MEDIA_TYPES: Final = tuple(_FORMATS)
_SAVING: Final[dict[str, dict[str, int | bool]]] = {
    PNG: {"compress_level": 6},
    JPEG: {"quality": 95, "subsampling": 0},
    WEBP: {"lossless": True, "quality": 80, "method": 4},
}
_MAX_PREVIEW_SCALE: Final = 4


def examine(image: types_pb2.Image, limits: ImageLimits, what: str = IMAGE) -> Header:
    """Type and size of an image, checked.

    Raises ImageUndecodable and ImageTooLarge; ``what`` names the image in their messages.
    """
    header = read_header(image.content, limits, what)
    if image.media_type and image.media_type != header.kind:
        raise ImageUndecodable(f"{what} is declared as {image.media_type}, but its bytes are {header.kind}")
    return header


def encode(pixels: Picture, media_type: str = PNG) -> types_pb2.Image:
    """Encode an image (height, width, 3) or mask (height, width) of uint8; equal pixels give equal bytes. Blocks."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, _FORMATS[media_type], **_SAVING[media_type])
    return types_pb2.Image(content=out.getvalue(), media_type=media_type)


def encode_preview(pixels: Picture, longest_px: int) -> types_pb2.Image:
    """A JPEG whose longest side is ``longest_px``, but at most four times that of the preview's own pixels. Blocks."""
    image = Image.fromarray(pixels)
    scale = min(longest_px / max(image.size), _MAX_PREVIEW_SCALE)
    width, height = (max(1, round(side * scale)) for side in image.size)
    out = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(out, "JPEG", quality=80)
    return types_pb2.Image(content=out.getvalue(), media_type=JPEG)
