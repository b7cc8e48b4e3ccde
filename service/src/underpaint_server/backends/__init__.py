"""Backends compute rows: one module for each, and the table of their names.

To add a backend, add a module to this package and a factory to :data:`BACKENDS`.
"""

from collections.abc import Callable, Mapping

from underpaint_server.backends.protocol import Backend
from underpaint_server.settings import Settings


def _torch(location: str, model_id: str, settings: Settings) -> Backend:
    from underpaint_server.backends.torch_ import TorchBackend

    return TorchBackend.load(location, model_id, settings)


def _toy(location: str, model_id: str, settings: Settings) -> Backend:
    from underpaint_server.backends.toy import ToyBackend

    return ToyBackend(model_id, settings, invariant=location != "pinned")


BACKENDS: Mapping[str, Callable[[str, str, Settings], Backend]] = {"torch": _torch, "toy": _toy}
"""Name -> factory (location of the checkpoint, model id, settings)."""


def load(location: str, model_id: str, settings: Settings) -> Backend:
    """Load a model; the backend is torch, or the one named NAME if ``location`` is ``NAME:LOCATION``.

    Raises :class:`ModelNotReady` if the checkpoint cannot be used.
    """
    name, colon, rest = location.partition(":")
    if colon and name in BACKENDS:
        return BACKENDS[name](rest, model_id, settings)
    return BACKENDS["torch"](location, model_id, settings)
