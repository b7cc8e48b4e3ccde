"""The digest that names an inversion."""

import hashlib
import json
from dataclasses import asdict
from enum import Enum
from typing import Final

from underpaint_server.jobs import InversionOptions, ModelInfo, Picture

_FORMAT: Final = 1
"""Raised whenever the same name would come to mean other latents."""


def inversion_digest(model: ModelInfo, pixels: Picture, options: InversionOptions) -> str:
    """The 64 hexadecimal digits that name the inversion of these fitted pixels.

    An equal name means equal latents, to the bit. They depend on more than the weights: on the very function that the
    network is here (its fingerprint: number format, device, threads, libraries) and on the batch that exact jobs are
    pinned to. So servers that differ in any of these name their inversions differently, and share none by accident.
    """
    head = {
        "format": _FORMAT,
        "model": model.digest,
        "fingerprint": model.fingerprint,
        "batch_class": model.batch_class,
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
