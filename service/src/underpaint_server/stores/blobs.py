"""Whole objects by path, written atomically: the layer between the stores and the object store."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import obstore
import structlog
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore

from underpaint_server.errors import StoreCorrupt, StoreUnavailable

_RETRY_AFTER_S: Final = 2.0
_DIGEST_CHARS: Final = 64
_SEAL: Final = re.compile(rb"[0-9a-f]{64}\n")

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Blob:
    """What a listing of the object store says of one object."""

    path: str
    version: str | None
    """The object's ETag, which changes when the object is replaced; None where the store has none."""
    written_at: float
    """Unix time in seconds, by the object store's clock."""
    size_bytes: int


class Blobs:
    """The objects of one object store. Any method raises StoreUnavailable if the store cannot be reached."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def read(self, path: str) -> bytes | None:
        """The bytes of an object; None if it does not exist."""
        found = await self.fetch(path)
        return None if found is None else found[0]

    async def fetch(self, path: str) -> tuple[bytes, float] | None:
        """The bytes of an object, and the Unix time in seconds, by the object store's clock, at which it was written;
        None if it does not exist."""
        with reaching(), suppress(FileNotFoundError):
            result = await obstore.get_async(self._store, path)
            return bytes(await result.bytes_async()), result.meta["last_modified"].timestamp()
        return None

    async def create(self, path: str, data: bytes) -> bool:
        """Create an object, atomically; returns False, and changes nothing, if one exists at this path."""
        with reaching(), suppress(AlreadyExistsError):
            await obstore.put_async(self._store, path, data, mode="create", use_multipart=False)
            return True
        return False

    async def exists(self, path: str) -> bool:
        """Whether an object exists."""
        with reaching(), suppress(FileNotFoundError):
            await obstore.head_async(self._store, path)
            return True
        return False

    async def remove(self, path: str) -> bool:
        """Remove an object; False if the store reports that it did not exist, which not every store does."""
        with reaching(), suppress(FileNotFoundError):
            await obstore.delete_async(self._store, path)
            return True
        return False

    async def below(self, folder: str) -> list[Blob]:
        """All objects in a folder and its subfolders."""
        blobs: list[Blob] = []
        with reaching():
            async for chunk in obstore.list(self._store, folder, chunk_size=1000):
                blobs += (
                    Blob(meta["path"], meta["e_tag"], meta["last_modified"].timestamp(), meta["size"]) for meta in chunk
                )
        return blobs


@contextmanager
def reaching() -> Iterator[None]:
    """Turn errors of the obstore library into StoreUnavailable.

    FileNotFoundError and AlreadyExistsError pass unchanged: they answer the question that was asked.
    """
    try:
        yield
    except (FileNotFoundError, AlreadyExistsError):
        raise
    except (BaseError, OSError) as error:
        # The error of the library may name the path, bucket or host: it goes to the log, not to the caller.
        _log.warning("object store unreachable", error=str(error))
        raise StoreUnavailable("the object store is unreachable; retry later", retry_after_s=_RETRY_AFTER_S) from error


def sealed(path: str, data: bytes) -> bytes:
    """``data`` for the object at ``path``, preceded by the SHA-256 of both in hexadecimal and a newline."""
    return _checksum(path, data) + b"\n" + data


def unsealed(path: str, data: bytes) -> bytes:
    """The data that :func:`sealed` was given for this path.

    Raises StoreCorrupt if the checksum does not match: the object is damaged, or it was written for another path. A
    checksum of the data alone, as earlier versions wrote it, is accepted.
    """
    digest, data = data[:_DIGEST_CHARS], data[_DIGEST_CHARS + 1 :]
    if digest not in (_checksum(path, data), hashlib.sha256(data).hexdigest().encode()):
        raise StoreCorrupt("a stored object fails its checksum, or is another object's")
    return data


def is_sealed(data: bytes) -> bool:
    """Whether the data begins as :func:`sealed` writes it."""
    return _SEAL.match(data) is not None


def _checksum(path: str, data: bytes) -> bytes:
    digest = hashlib.sha256(f"{path}\n".encode())
    digest.update(data)
    return digest.hexdigest().encode()
