"""The one format of the safetensors files that the server writes: arrays, and a JSON record about them.

The arrays are the file's tensors. ``__metadata__`` has one string, ``underpaint``: the record as canonical JSON, and in
it ``sha256`` over all its other members and over every tensor's name, type, shape and bytes. Equal arguments give equal
bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from underpaint_server.errors import StoreCorrupt
from underpaint_server.jobs import Array

Record = dict[str, Any]

_KEY = "underpaint"
_DIGEST = "sha256"
_PREFIX_BYTES = 8


@dataclass(frozen=True, slots=True)
class File:
    """What a file has in it, its checksum verified."""

    record: Record
    """Without the checksum."""
    arrays: Mapping[str, Array]
    sha256: str
    """The checksum, hexadecimal."""


def encode(record: Record, arrays: Mapping[str, Array]) -> bytes:
    """The safetensors file. ``record`` has values that JSON has, and no ``sha256``."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(dict(arrays), metadata={_KEY: _canonical(record | {_DIGEST: digest(record, arrays)})})


def decode(data: bytes, *, named: bool = True) -> File:
    """Read a file that may come from anywhere; raises StoreCorrupt if a bit of what matters has changed.

    ``named`` False is for files whose checksum leaves out the names of the tensors.
    """
    try:
        arrays = load(data)  # first: it checks the header that is read next
    except (SafetensorError, ValueError) as error:
        raise StoreCorrupt(f"the file is no safetensors file: {error}") from error
    record = read_record(data)
    promised = record.pop(_DIGEST, None)
    actual = digest(record, arrays, named=named)
    if promised != actual:
        raise StoreCorrupt("the file fails its checksum")
    return File(record, arrays, actual)


def read_record(head: bytes) -> Record:
    """The record, checksum included but not verified, from the first ``header_bytes(head)`` bytes of a file at least.

    Raises StoreCorrupt.
    """
    try:
        header = json.loads(head[_PREFIX_BYTES : header_bytes(head)])
        text = header["__metadata__"][_KEY]
        record = json.loads(text)
        canonical = _canonical(record)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreCorrupt(f"the header cannot be read: {error!r}") from error
    if not isinstance(record, dict) or canonical != text:
        raise StoreCorrupt("the header is not as this server writes it")
    return record


def header_bytes(head: bytes) -> int:
    """How many bytes of a file must be read to know its record, from the first eight."""
    return _PREFIX_BYTES + int.from_bytes(head[:_PREFIX_BYTES], "little")


def digest(record: Record, arrays: Mapping[str, Array], *, named: bool = True) -> str:
    """sha256 (hexadecimal) over a record without checksum and over its arrays."""
    total = hashlib.sha256(_canonical(record).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        about = [array.dtype.str, array.shape]
        total.update(json.dumps([name, *about] if named else about).encode())
        total.update(array.data)
    return total.hexdigest()


def _canonical(record: Record) -> str:
    return json.dumps(record, sort_keys=True, allow_nan=False)
