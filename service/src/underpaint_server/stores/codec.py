"""The format of every safetensors file that the server writes: arrays, and a JSON record about them.

The arrays are the file's tensors. ``__metadata__`` has one entry, ``underpaint``: the record as canonical JSON. Its
member ``sha256`` is the checksum over all other members and over the name, dtype, shape and bytes of every tensor.
Equal arguments give equal files.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from underpaint_server.errors import StoreCorrupt
from underpaint_server.jobs import Array

Record = dict[str, Any]

_KEY = "underpaint"
_DIGEST = "sha256"
_PREFIX_BYTES = 8


@dataclass(frozen=True, slots=True)
class File:
    """The content of a file whose checksum was verified."""

    record: Record
    """The JSON record, without its ``sha256``."""
    arrays: Mapping[str, Array]
    """Name to array."""
    sha256: str
    """The checksum, 64 hexadecimal digits."""


def encode(record: Record, arrays: Mapping[str, Array]) -> bytes:
    """The safetensors file. ``record`` must be representable in JSON and have no ``sha256``."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(dict(arrays), metadata={_KEY: _canonical(record | {_DIGEST: digest(record, arrays)})})


def decode(data: bytes, *, named: bool = True) -> File:
    """Read a file that is not trusted; raises StoreCorrupt if it is malformed or fails its checksum.

    ``named`` False is for files whose checksum does not cover the names of the tensors.
    """
    arrays = read_arrays(data)  # first, since it validates the header that read_record parses
    record = read_record(data)
    expected = record.pop(_DIGEST, None)
    actual = digest(record, arrays, named=named)
    if expected != actual:
        raise StoreCorrupt("the file fails its checksum")
    return File(record, arrays, actual)


def read_arrays(data: bytes) -> dict[str, Array]:
    """The arrays alone, of any safetensors file; nothing else is verified. Raises StoreCorrupt."""
    try:
        return load(data)
    except KeyError as error:
        raise StoreCorrupt(f"a tensor has the type {error}, which is not supported") from error
    except MemoryError:
        raise
    except Exception as error:  # libraries raise many types of errors for malformed bytes
        raise StoreCorrupt(f"not a safetensors file: {error}") from error


def read_record(head: bytes) -> Record:
    """The record, with its ``sha256``, from the start of a file; the checksum is not verified.

    ``head`` must have at least the first ``header_bytes(head)`` bytes of the file. Raises StoreCorrupt.
    """
    try:
        header = json.loads(head[_PREFIX_BYTES : header_bytes(head)])
        metadata = header["__metadata__"]
        text = metadata[_KEY]
        record = json.loads(text)
        canonical = _canonical(record)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreCorrupt(f"the header cannot be read: {type(error).__name__}") from error
    if not isinstance(record, dict) or canonical != text or len(metadata) != 1:
        raise StoreCorrupt("the header is not in the form that this server writes")
    return record


def header_bytes(head: bytes) -> int:
    """Length in bytes of a file's header, prefix included, from the file's first eight bytes."""
    return _PREFIX_BYTES + int.from_bytes(head[:_PREFIX_BYTES], "little")


def digest(record: Record, arrays: Mapping[str, Array], *, named: bool = True) -> str:
    """SHA-256, as 64 hexadecimal digits, over a record without ``sha256`` and over the arrays."""
    total = hashlib.sha256(_canonical(record).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        layout = [array.dtype.str, array.shape]
        total.update(json.dumps([name, *layout] if named else layout).encode())
        total.update(array.data)
    return total.hexdigest()


def _canonical(record: Record) -> str:
    return json.dumps(record, sort_keys=True, allow_nan=False)
