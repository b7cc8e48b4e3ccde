"""Resource names and request ids."""

import re
from typing import Final

from underpaint_server.errors import FieldInvalid, FieldViolation

_MODEL: Final = re.compile(r"models/([^/]+)")
_INVERSION: Final = re.compile(r"inversions/([0-9a-f]{64})")
_DIRECTION: Final = re.compile(r"directions/([a-z0-9-]{1,63})")
_OPERATION: Final = re.compile(r"operations/([0-9a-f]{32})")
_REQUEST: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", re.IGNORECASE)


def model_id(name: str, path: str) -> str:
    """ "models/{id}" -> id; FieldInvalid at ``path`` for anything else."""
    return _parse(_MODEL, name, path, "models/{id}, id without /")


def inversion_id(name: str, path: str) -> str:
    """ "inversions/{sha256}" -> 64 hexadecimal digits; FieldInvalid at ``path`` for anything else."""
    return _parse(_INVERSION, name, path, "inversions/{sha256}, sha256 of 64 hexadecimal digits (0-9, a-f)")


def direction_id(name: str, path: str) -> str:
    """ "directions/{id}" -> id; FieldInvalid at ``path`` for anything else."""
    return _parse(_DIRECTION, name, path, "directions/{id}, id of 1 to 63 characters of a-z, 0-9 and -")


def operation_id(name: str, path: str) -> str:
    """ "operations/{id}" -> 32 hexadecimal digits; FieldInvalid at ``path`` for anything else."""
    return _parse(_OPERATION, name, path, "operations/{id}, id of 32 hexadecimal digits (0-9, a-f)")


def model_name(identifier: str) -> str:
    """ "models/{id}"."""
    return f"models/{identifier}"


def inversion_name(identifier: str) -> str:
    """ "inversions/{sha256}"."""
    return f"inversions/{identifier}"


def direction_name(identifier: str) -> str:
    """ "directions/{id}"."""
    return f"directions/{identifier}"


def operation_name(identifier: str) -> str:
    """ "operations/{id}"."""
    return f"operations/{identifier}"


def is_request_id(text: str) -> bool:
    """Whether the text is a UUID of version 4 in the form 8-4-4-4-12, in upper or lower case."""
    return _REQUEST.fullmatch(text) is not None


def _parse(pattern: re.Pattern[str], name: str, path: str, form: str) -> str:
    match = pattern.fullmatch(name)
    if match is None:
        raise FieldInvalid(FieldViolation(path, f"must have the form {form}"))
    return match[1]
