"""Resource names, and the digest that names an inversion."""

import hashlib
import json
import re
from dataclasses import asdict
from enum import Enum
from typing import Final

from underpaint_server.errors import FieldInvalid, FieldViolation
from underpaint_server.jobs import InversionOptions, ModelInfo, Picture

_MODEL: Final = re.compile(r"models/([^/]+)")
_INVERSION: Final = re.compile(r"inversions/([0-9a-f]{64})")
_FORMAT: Final = 1
"""Raised whenever the same name would come to mean other latents."""


def model_id(name: str, path: str) -> str:
    """ "models/{id}" -> id; FieldInvalid at ``path`` for anything else."""
    return _parse(_MODEL, name, path, "models/{id}")


def inversion_id(name: str, path: str) -> str:
    """ "inversions/{sha256}" -> 64 hexadecimal digits; FieldInvalid at ``path`` for anything else."""
    return _parse(_INVERSION, name, path, "inversions/{sha256}")


def model_name(identifier: str) -> str:
    """ "models/{id}"."""
    return f"models/{identifier}"


def inversion_name(identifier: str) -> str:
    """ "inversions/{sha256}"."""
    return f"inversions/{identifier}"


def inversion_digest(model: ModelInfo, pixels: Picture, options: InversionOptions) -> str:
    """The 64 hexadecimal digits that name the inversion of these fitted pixels: equal inputs, equal latents."""
    head = {
        "format": _FORMAT,
        "model": model.digest,
        "dtype": model.dtype,
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


def _parse(pattern: re.Pattern[str], name: str, path: str, form: str) -> str:
    match = pattern.fullmatch(name)
    if match is None:
        raise FieldInvalid(FieldViolation(path, f"not of the form {form}"))
    return match[1]
