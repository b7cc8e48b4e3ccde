"""Whole objects by path, each written at once or not at all: what every store here is made of."""

import hashlib
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

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Blob:
    """What the place tells of an object without opening it."""

    path: str
    version: str | None
    """Changes when the object is replaced."""
    written_at: float
    """Unix time, by the clock of the place."""


class Blobs:
    """Objects of one place. Any call raises StoreUnavailable if the place is silent."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def read(self, path: str) -> bytes | None:
        """The whole object; None if there is none."""
        with reaching(), suppress(FileNotFoundError):
            answer = await obstore.get_async(self._store, path)
            return bytes(await answer.bytes_async())
        return None

    async def create(self, path: str, data: bytes) -> bool:
        """Write an object that is not there yet; False, and nothing is changed, if it is."""
        with reaching(), suppress(AlreadyExistsError):
            await obstore.put_async(self._store, path, data, mode="create", use_multipart=False)
            return True
        return False

    async def exists(self, path: str) -> bool:
        """Whether there is such an object."""
        with reaching(), suppress(FileNotFoundError):
            await obstore.head_async(self._store, path)
            return True
        return False

    async def remove(self, path: str) -> bool:
        """Remove an object; False if there was none, as far as the place tells."""
        with reaching(), suppress(FileNotFoundError):
            await obstore.delete_async(self._store, path)
            return True
        return False

    async def below(self, folder: str) -> list[Blob]:
        """All objects below a folder."""
        found: list[Blob] = []
        with reaching():
            async for chunk in obstore.list(self._store, folder, chunk_size=1000):
                found += (Blob(meta["path"], meta["e_tag"], meta["last_modified"].timestamp()) for meta in chunk)
        return found


@contextmanager
def reaching() -> Iterator[None]:
    """Turn what the library raises into StoreUnavailable, but for what says that something is there or is not."""
    try:
        yield
    except (FileNotFoundError, AlreadyExistsError):
        raise
    except (BaseError, OSError) as error:
        # The caller is not told where the place is.
        _log.warning("the store is out of reach", error=str(error))
        raise StoreUnavailable(
            "the place of what is stored does not answer; come back in a while", retry_after_s=_RETRY_AFTER_S
        ) from error


def sealed(data: bytes) -> bytes:
    """The bytes behind their own digest."""
    return hashlib.sha256(data).hexdigest().encode() + b"\n" + data


def unsealed(data: bytes) -> bytes:
    """The bytes of :func:`sealed`; raises StoreCorrupt if any has changed."""
    digest, data = data[:_DIGEST_CHARS], data[_DIGEST_CHARS + 1 :]
    if hashlib.sha256(data).hexdigest().encode() != digest:
        raise StoreCorrupt("a stored object fails its checksum")
    return data
