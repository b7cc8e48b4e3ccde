"""Backends compute rows: one module for each, and the table of their names.

To add a backend, add a module to this package and a factory to :data:`BACKENDS`.
"""

from collections.abc import Callable, Mapping

import structlog

from underpaint_server.backends.protocol import Backend
from underpaint_server.settings import Settings

Report = Callable[[str], None]
"""Function that is told, while a model loads, what is being done and what is remarkable about the checkpoint."""


def _torch(location: str, model_id: str, settings: Settings, report: Report) -> Backend:
    from underpaint_server.backends.torch_ import TorchBackend

    return TorchBackend.load(location, model_id, settings, report)


def _toy(location: str, model_id: str, settings: Settings, report: Report) -> Backend:
    from underpaint_server.backends.toy import ToyBackend

    del report
    return ToyBackend(model_id, settings, invariant=location != "pinned")


BACKENDS: Mapping[str, Callable[[str, str, Settings, Report], Backend]] = {"torch": _torch, "toy": _toy}
"""Name -> factory (location of the checkpoint, model id, settings, report)."""


def load(location: str, model_id: str, settings: Settings, report: Report | None = None) -> Backend:
    """Load a model; the backend is torch, or the one named NAME if ``location`` is ``NAME:LOCATION``.

    ``report`` is the log by default. Raises :class:`ModelNotReady` if the checkpoint cannot be used.
    """
    if report is None:
        log = structlog.get_logger(__name__).bind(model=model_id)

        def report(line: str) -> None:
            log.info("loading a model", note=line)

    name, colon, rest = location.partition(":")
    if colon and name in BACKENDS:
        return BACKENDS[name](rest, model_id, settings, report)
    return BACKENDS["torch"](location, model_id, settings, report)
