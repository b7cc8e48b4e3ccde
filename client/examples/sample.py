"""What the examples share: an image to edit, and the flags."""

import argparse
import io
import os

from PIL import Image, ImageDraw

SOURCE_PROMPT = "a simple red circle on a white plain background"
TARGET_PROMPT = "a simple blue circle on a white plain background"


def red_circle() -> Image.Image:
    """An icon of 64 x 64 pixels, the size of the embedded model."""
    image = Image.new("RGB", (256, 256), (250, 250, 250))
    ImageDraw.Draw(image).ellipse((40, 40, 216, 216), fill=(205, 48, 48))
    return image.resize((64, 64), Image.Resampling.LANCZOS)


def red_circle_png() -> bytes:
    """The same icon as PNG bytes."""
    buffer = io.BytesIO()
    red_circle().save(buffer, "PNG")
    return buffer.getvalue()


def flags(description: str | None, output: str) -> argparse.ArgumentParser:
    """A parser with the flags ``--target`` and ``--output``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--target", default=os.environ.get("UNDERPAINT_TARGET", "localhost:50051"), help="server, host:port"
    )
    parser.add_argument("--output", default=output, help="file or folder to write (default: %(default)s)")
    return parser
