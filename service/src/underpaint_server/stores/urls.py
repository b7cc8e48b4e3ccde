"""The object store behind a URL."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from obstore.store import LocalStore, MemoryStore, ObjectStore, S3Store


def open_store(url: str) -> ObjectStore:
    """The object store at ``memory:///``, ``file:///path`` or ``s3://bucket/prefix``.

    A missing directory is created. S3 takes its credentials, region and endpoint from the ``AWS_*`` environment
    variables. Raises ValueError for any other URL, with the supported schemes in the message.
    """
    parts = urlsplit(url)
    if parts.scheme not in STORES:
        raise ValueError(
            f"store '{url}': the scheme must be one of {', '.join(STORES)}, as in file:///var/lib/underpaint"
        )
    return STORES[parts.scheme](parts)


def is_shared(url: str) -> bool:
    """Whether other servers can open the same object store."""
    return urlsplit(url).scheme != "memory"


def _memory(parts: SplitResult) -> ObjectStore:
    if parts.netloc or parts.path.strip("/"):
        raise ValueError(f"store '{parts.geturl()}': the memory store has no path, write memory:///")
    return MemoryStore()


def _file(parts: SplitResult) -> ObjectStore:
    if parts.netloc or not parts.path.startswith("/"):
        raise ValueError(f"store '{parts.geturl()}': write an absolute path after file://, as in file:///path")
    return LocalStore(Path(unquote(parts.path)), mkdir=True)


def _s3(parts: SplitResult) -> ObjectStore:
    if not parts.netloc:
        raise ValueError(f"store '{parts.geturl()}': the bucket is missing, write s3://bucket/prefix")
    # allow_http only takes effect for an AWS_ENDPOINT_URL that begins with http://. The library's default retries for
    # three minutes, which is too long for a call with a deadline.
    return S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        client_options={
            "allow_http": True,
            "connect_timeout": timedelta(seconds=5),
            "timeout": timedelta(seconds=30),
        },
        retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=30)},
    )


STORES: dict[str, Callable[[SplitResult], ObjectStore]] = {"memory": _memory, "file": _file, "s3": _s3}
"""URL scheme to the function that opens such a store."""
