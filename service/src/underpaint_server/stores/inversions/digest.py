"""The digest that names an inversion."""

import hashlib
import json
from dataclasses import asdict
from enum import Enum
from typing import Final

from underpaint_server.jobs import InversionOptions, ModelInfo, Picture

_FORMAT: Final = 1
"""Raise this when a change makes the same inputs give other latents, so that old names are not reused."""


def inversion_digest(model: ModelInfo, pixels: Picture, options: InversionOptions) -> str:
    """The name of the inversion of fitted pixels (height, width, 3) uint8: 64 hexadecimal digits of SHA-256.

    Inversions with equal names have bitwise equal latents. The latents depend on the weights (``model.digest``), on how
    the network is computed (``model.fingerprint``: dtype, device, threads, libraries) and on the batch class at their
    size. Servers that differ in any of these give the same image different names, and so share no inversions.
    """
    head = {
        "format": _FORMAT,
        "model": model.digest,
        "fingerprint": model.fingerprint,
        "batch_class": model.batch_class_at(pixels.shape[1], pixels.shape[0]),
        "shape": pixels.shape,
        "method": type(options.method).__name__,
        "options": asdict(options),
    }
    digest = hashlib.sha256(json.dumps(head, sort_keys=True, default=_plain).encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def _plain(value: object) -> object:
    assert isinstance(value, Enum)
    return value.value
