"""Fitting an image of any size to a size that the model works at, and the record of how it was done."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol

import numpy as np
from PIL import Image

from underpaint_server.jobs import Picture

Size = tuple[int, int]
"""(width, height) in pixels."""


class Fit(IntEnum):
    """The values of ``underpaint.v1.Fit``. Not those themselves: the decoder process loads no protobuf."""

    FIT_UNSPECIFIED = 0
    FIT_CROP = 1
    FIT_PAD = 2
    FIT_RESIZE = 3


class Canvas(Protocol):
    """What fitting needs to know of a model."""

    @property
    def width(self) -> int:
        """In pixels."""

    @property
    def height(self) -> int:
        """In pixels."""

    @property
    def size_multiple(self) -> int:
        """Both sides of a fitted image are multiples of this."""


@dataclass(frozen=True, slots=True)
class Fitting:
    """Which part of a received image is where in the fitted image; the fields are those of the message ``Fitting``.

    All values are in pixels: ``source_*`` of the received image after EXIF orientation, the others of the fitted one.
    """

    fit: int
    """A value of ``underpaint.v1.Fit``; FIT_UNSPECIFIED if the image had the size already."""
    source_width: int
    source_height: int
    width: int
    height: int
    source_left: int
    source_top: int
    source_box_width: int
    source_box_height: int
    left: int
    top: int
    box_width: int
    box_height: int

    @property
    def source_size(self) -> Size:
        """The size of the received image."""
        return self.source_width, self.source_height

    @property
    def size(self) -> Size:
        """The size of the fitted image."""
        return self.width, self.height


def plan(fit: int, source: Size, model: Canvas) -> Fitting:
    """How an image of the size ``source`` is fitted; ``fit`` is a value of ``underpaint.v1.Fit``."""
    return _PLANS[fit](source, model)


def untouched(size: Size) -> Fitting:
    """The record of an image that already has a size the model works at."""
    return _whole(Fit.FIT_UNSPECIFIED, size, size)


def fit_picture(image: Image.Image, fitting: Fitting) -> Picture:
    """The fitted pixels (height, width, 3) uint8 of an RGB image, resized with a Lanczos filter."""
    return _apply(image, fitting, Image.Resampling.LANCZOS)


def fit_mask(image: Image.Image, fitting: Fitting) -> Picture:
    """The fitted mask (height, width) uint8, 0 or 255, of a grey image of the fitting's source size.

    Values from 128 count as white; the mask is resized to the nearest pixel.
    """
    binary = image.point(lambda value: 255 if value >= 128 else 0)
    return _apply(binary, fitting, Image.Resampling.NEAREST)


def _apply(image: Image.Image, fitting: Fitting, resampling: Image.Resampling) -> Picture:
    f = fitting
    box = (f.source_left, f.source_top, f.source_left + f.source_box_width, f.source_top + f.source_box_height)
    if (f.box_width, f.box_height) != f.source_size or box != (0, 0, *f.source_size):
        image = image.resize((f.box_width, f.box_height), resampling, box=box)
    pixels = np.asarray(image, dtype=np.uint8)
    margins = [(f.top, f.height - f.top - f.box_height), (f.left, f.width - f.left - f.box_width)]
    return np.pad(pixels, margins + [(0, 0)] * (pixels.ndim - 2), mode="edge")


def _crop(source: Size, model: Canvas) -> Fitting:
    target = (model.width, model.height)
    if source == target:
        return _whole(Fit.FIT_UNSPECIFIED, source, source)
    scale = max(target[0] / source[0], target[1] / source[1])
    width, height = (max(1, min(s, round(t / scale))) for s, t in zip(source, target, strict=True))
    left, top = (source[0] - width) // 2, (source[1] - height) // 2
    return Fitting(Fit.FIT_CROP, *source, *target, left, top, width, height, 0, 0, *target)


def _pad(source: Size, model: Canvas) -> Fitting:
    target = (model.width, model.height)
    if source == target:
        return _whole(Fit.FIT_UNSPECIFIED, source, source)
    scale = min(target[0] / source[0], target[1] / source[1])
    width, height = (max(1, min(t, round(s * scale))) for s, t in zip(source, target, strict=True))
    left, top = (target[0] - width) // 2, (target[1] - height) // 2
    return Fitting(Fit.FIT_PAD, *source, *target, 0, 0, *source, left, top, width, height)


def _resize(source: Size, model: Canvas) -> Fitting:
    target = _same_area(source, model)
    return _whole(Fit.FIT_UNSPECIFIED if target == source else Fit.FIT_RESIZE, source, target)


def _whole(fit: int, source: Size, target: Size) -> Fitting:
    return Fitting(fit, *source, *target, 0, 0, *source, 0, 0, *target)


def _same_area(source: Size, model: Canvas) -> Size:
    """A size of about the model's pixel count and the source's aspect ratio.

    A source whose size can be the result of this is kept, so that fitting a fitted image changes nothing.
    """
    unit, area = model.size_multiple, model.width * model.height
    if all(side % unit == 0 for side in source) and 0.6 * area <= source[0] * source[1] <= 1.5 * area:
        return source
    longest = max(1, area // unit**2)
    aspect = source[0] / source[1]
    ideal = ((area * aspect) ** 0.5, (area / aspect) ** 0.5)
    width, height = (unit * min(longest, max(1, round(side / unit))) for side in ideal)
    return width, height


_PLANS: Final[dict[int, Callable[[Size, Canvas], Fitting]]] = {
    Fit.FIT_UNSPECIFIED: _crop,
    Fit.FIT_CROP: _crop,
    Fit.FIT_PAD: _pad,
    Fit.FIT_RESIZE: _resize,
}
