"""Enumerations that several parts of a request share. An argument of such a type also takes the value as a string."""

from enum import StrEnum


class Fit(StrEnum):
    """How an image of another size is brought to the model's size. EXIF orientation is applied first."""

    CROP = "crop"
    """Scale the image until it covers the model's width and height, then crop to the centre."""
    PAD = "pad"
    """Scale the image until it lies inside the model's width and height, then repeat its edge pixels around it."""
    RESIZE = "resize"
    """Keep the aspect ratio: scale to the model's pixel count, each side a multiple of ``Limits.size_multiple``."""


class Priority(StrEnum):
    """Order in the server's queue; a higher priority runs first."""

    BATCH = "batch"
    """Lowest: runs after all other requests."""
    NORMAL = "normal"
    """The default."""
    INTERACTIVE = "interactive"
    """Highest: a person is waiting for the result."""


class Sampler(StrEnum):
    """How a disentangled edit computes a step from the noise predictions."""

    DDIM = "ddim"
    """From the last prediction (Song et al., ICLR 2021)."""
    PLMS = "plms"
    """From the last four predictions (Liu et al., ICLR 2022): one more network evaluation, smaller errors."""
