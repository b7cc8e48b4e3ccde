"""The cache directory: what a server has measured or made from a checkpoint, and can measure or make again."""

import os
from pathlib import Path
from tempfile import NamedTemporaryFile

import structlog

from underpaint_server.settings import Settings

_log = structlog.get_logger(__name__)


def directory(settings: Settings) -> Path | None:
    """The cache directory, made if it does not exist: ``cache_dir``, or ``underpaint`` in the user's cache directory.

    None, with a warning in the log, if files cannot be written there; then nothing is kept.
    """
    try:
        path = location(settings)
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write in {path}")
    except (OSError, RuntimeError, ValueError) as error:
        _log.warning("the cache directory cannot be used, so nothing is kept there", error=str(error))
        return None
    return path


def location(settings: Settings) -> Path:
    """The cache directory, whether or not it exists and files can be written there: it may have been filled before.

    Raises :class:`RuntimeError` if none is named and the user has no home directory.
    """
    return Path(settings.cache_dir) if settings.cache_dir else _default()


def read(settings: Settings, name: str) -> bytes | None:
    """The small file of this name, such as "folder/file"; None if there is none. Raises :class:`OSError`."""
    try:
        return (location(settings) / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError, RuntimeError, ValueError):  # or no directory can be named
        return None


def write(settings: Settings, name: str, text: str) -> None:
    """Write a small file in one step: who reads it finds the one before or this one, whole.

    A failure is a warning in the log.
    """
    folder = directory(settings)
    if folder is None:
        return
    try:
        (folder / name).parent.mkdir(exist_ok=True)
        replace(folder / name, text)
    except OSError as error:
        _log.warning(
            "a file of the cache cannot be written, so it is made again", path=str(folder / name), error=str(error)
        )


def replace(path: Path, text: str) -> None:
    """Write a file in one step: who reads it finds the one before or this one, whole. Raises :class:`OSError`."""
    with NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).chmod(0o644)  # servers of other users may read it
    Path(file.name).replace(path)


def _default() -> Path:
    """``$XDG_CACHE_HOME/underpaint``; a relative path there counts as none, as its specification says."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "underpaint"
