"""Backends compute rows: one module for each, and the table of their names.

To add a backend, add a module to this package and a line to :data:`BACKENDS`.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from underpaint_server.backends.protocol import Backend
from underpaint_server.jobs import ModelInfo
from underpaint_server.settings import Settings


class Loader(Protocol):
    """Loads a checkpoint into a backend."""

    def __call__(self, location: str, model_id: str, settings: Settings, known: ModelInfo | None, /) -> Backend:
        """See :func:`load`."""


def _torch() -> Loader:
    from underpaint_server.backends.torch_ import load

    return load


def _toy() -> Loader:
    from underpaint_server.backends.toy import ToyBackend

    return lambda location, model_id, settings, _: ToyBackend(model_id, settings, invariant=location != "pinned")


BACKENDS: Mapping[str, Callable[[], Loader]] = {"torch": _torch, "toy": _toy}
"""Name -> function that imports the backend's module and gives its loader."""


def load(location: str, model_id: str, settings: Settings, known: ModelInfo | None = None) -> Backend:
    """Load a model; the backend is torch, or the one named NAME if ``location`` is ``NAME:LOCATION``.

    ``known`` is what an earlier process on this machine found of this model, with the same settings. Raises
    :class:`ModelNotReady` if the checkpoint cannot be used.
    """
    name, rest = _split(location)
    return BACKENDS[name]()(rest, model_id, settings, known)


def preload(settings: Settings) -> None:
    """Import what the configured models need, without touching a device; it takes seconds."""
    for _, location in settings.model_locations:
        name, _ = _split(location)
        BACKENDS[name]()


def _split(location: str) -> tuple[str, str]:
    """Name of the backend, and the location that it is given."""
    name, colon, rest = location.partition(":")
    return (name, rest) if colon and name in BACKENDS else ("torch", location)
