"""Files of the command: whether a result can be written, and which pictures of a folder are edited."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from underpaint import images
from underpaint._flags import UsageError


class NotWritten(Exception):
    """The work is done, and its result could not be written."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a command does with a folder of pictures."""

    todo: tuple[tuple[Path, Path], ...]
    """Pictures to edit, each with the path of its result."""
    kept: tuple[Path, ...]
    """Results of an earlier run, which are left alone."""
    others: tuple[Path, ...]
    """Files that are no pictures by their suffix, pipes and the like."""


def check_writable(path: str | os.PathLike[str], flag: str) -> None:
    """Raise UsageError, which names the flag, if a file cannot be written; call it before the work.

    A file that exists is left as it is; one that does not is created and removed. A device or a pipe is not opened.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise UsageError(f"{flag}: {path} is a folder: name a file")
    if not target.parent.is_dir():
        raise UsageError(f"{flag}: the folder of {path} does not exist: create it first")
    try:
        if target.is_file():
            os.close(os.open(target, os.O_WRONLY | os.O_APPEND))
        elif not target.exists():
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            target.unlink()
    except OSError as error:
        raise UsageError(f"{flag}: {path} cannot be written: {error.strerror}") from None


def check_picture(path: str | os.PathLike[str], flag: str) -> str:
    """The media type of a picture to write; UsageError for another suffix, or where it cannot be written."""
    if not Path(path).is_dir() and _media_type_of(path) is None:
        raise UsageError(f"{flag}: {path}: the suffix chooses the image format; use one of .png, .jpg, .jpeg, .webp")
    check_writable(path, flag)
    return images.media_type_of(path)


def plan(source: Path, output: Path, overwrite: bool) -> Plan:
    """Which pictures of ``source`` and its subfolders are edited, and where in ``output`` each result is written.

    A result has the path, the name and the suffix of its picture. Hidden files and folders, links to folders, and
    ``output`` itself are left out. UsageError if there is no picture, or if ``output`` is ``source`` or a file; OSError
    if a folder cannot be read.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"-o: {output} is a file, and {source} is a folder of pictures: name a folder")
    if output.exists() and output.samefile(source):
        raise UsageError(f"-o: {output} is the folder of the pictures, which would be replaced: name another folder")
    found = list(_walk(source, output))
    # A pipe would be waited for without end. A link to nothing is left in, and fails by its name.
    files = [path for path in found if path.is_file() or not path.exists()]
    results = {path: output / path.relative_to(source) for path in files if _media_type_of(path)}
    if not results:
        raise UsageError(f"{source}: there is no .png, .jpg, .jpeg or .webp file in this folder")
    kept = {path for path, result in results.items() if result.is_file() and not overwrite}
    todo = [(path, result) for path, result in results.items() if path not in kept]
    return Plan(
        todo=tuple(todo),
        kept=tuple(result for path, result in results.items() if path in kept),
        others=tuple(path for path in found if path not in results),
    )


def prepare(results: Sequence[Path]) -> None:
    """Create the folders of results; UsageError where that fails, or where a result cannot be written."""
    for folder in sorted({result.parent for result in results}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"-o: the folder {folder} cannot be created: {error.strerror}") from None
        check_writable(_beside(folder / "any.png"), "-o")
    for result in results:
        if result.is_dir():
            raise UsageError(f"-o: {result} is a folder, and the result of a picture of this name is a file")


def replace(path: Path, save: Callable[[Path], object]) -> None:
    """Let ``save`` write a file beside ``path``, then give it that name: a stopped run leaves no half a result."""
    beside = _beside(path)
    try:
        save(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    return path.with_name(f".underpaint-{os.getpid()}{path.suffix}")


def _media_type_of(path: str | os.PathLike[str]) -> str | None:
    try:
        return images.media_type_of(path)
    except ValueError:
        return None


def _walk(source: Path, output: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error  # by default the pictures of a folder that cannot be read would be missing without a word

    left_out = output.resolve()
    for folder, folders, names in os.walk(source, onerror=refuse):
        kept = sorted(name for name in folders if not name.startswith(".") and Path(folder, name).resolve() != left_out)
        folders[:] = kept
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))
