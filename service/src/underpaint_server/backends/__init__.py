"""Who computes rows: one file each, and the table that names them.

Adding a backend: its file here, its line below.
"""

from collections.abc import Callable, Mapping

from underpaint_server.backends.protocol import Backend
from underpaint_server.settings import Settings


def _torch(place: str, model_id: str, settings: Settings) -> Backend:
    from underpaint_server.backends.torch_ import TorchBackend

    return TorchBackend.load(place, model_id, settings)


def _toy(place: str, model_id: str, settings: Settings) -> Backend:
    from underpaint_server.backends.toy import ToyBackend

    return ToyBackend(model_id, settings, invariant=place != "pinned")


BACKENDS: Mapping[str, Callable[[str, str, Settings], Backend]] = {"torch": _torch, "toy": _toy}
"""Name -> factory of (place of the checkpoint, model id, settings)."""


def load(place: str, model_id: str, settings: Settings) -> Backend:
    """The backend for a model's place: ``NAME:PLACE`` chooses one by name, anything else is torch."""
    name, colon, rest = place.partition(":")
    if colon and name in BACKENDS:
        return BACKENDS[name](rest, model_id, settings)
    return BACKENDS["torch"](place, model_id, settings)
