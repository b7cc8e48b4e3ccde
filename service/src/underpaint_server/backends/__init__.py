"""Backends compute rows: one module for each, and the table of their names.

To add a backend, add a module to this package and a line to :data:`BACKENDS`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import structlog

from underpaint_server.backends.protocol import Backend
from underpaint_server.backends.runtime import Unavailable
from underpaint_server.errors import ModelNotReady, cause_of
from underpaint_server.jobs import Exactness
from underpaint_server.settings import Settings

if TYPE_CHECKING:
    from underpaint_server.backends.exactness import Survey

log = structlog.get_logger(__name__)


class Loader(Protocol):
    """Loads a checkpoint into a backend; raises :class:`Unavailable` if the backend cannot compute it here."""

    def __call__(self, location: str, model_id: str, settings: Settings, survey: "Survey | None", /) -> Backend:
        """See :func:`load`."""


def _torch() -> Loader:
    from underpaint_server.backends.torch_ import load

    return load


def _openvino() -> Loader:
    try:
        from underpaint_server.backends.openvino_ import load
    except ImportError as error:
        raise Unavailable("OpenVINO is not installed: pip install 'underpaint-server[openvino]'") from error
    return load


def _onnxruntime() -> Loader:
    try:
        from underpaint_server.backends.onnxruntime_ import load
    except ImportError as error:
        raise Unavailable(
            "ONNX Runtime is not installed: pip install 'underpaint-server[onnxruntime]' or, for a GPU, "
            "'underpaint-server[onnxruntime-gpu]'"
        ) from error
    return load


def _toy() -> Loader:
    from underpaint_server.backends.toy import ToyBackend

    return lambda location, model_id, settings, survey: ToyBackend(
        model_id, settings, survey, invariant=location != "pinned"
    )


BACKENDS: Mapping[str, Callable[[], Loader]] = {
    "openvino": _openvino, "onnxruntime": _onnxruntime, "torch": _torch, "toy": _toy
}  # fmt: skip
"""Name -> function that imports the backend's module and gives its loader; it raises :class:`Unavailable` if what it
needs is not installed."""

AUTO = {"cpu": ("openvino", "onnxruntime", "torch"), "cuda": ("torch",)}
"""Kind of device -> the backends of ``--backend auto``, the fastest first, as benchmarks/results shows."""


def load(location: str, model_id: str, settings: Settings, survey: "Survey | None" = None) -> Backend:
    """Load a model with the backend that the settings name, or the one named NAME if ``location`` is ``NAME:LOCATION``.

    ``survey`` says how it is measured; by default it is not where an earlier process on this machine did so. Raises
    :class:`ModelNotReady` if the checkpoint cannot be used.
    """
    names, rest = _split(location, settings)
    for name in names:
        try:
            backend = BACKENDS[name]()(rest, model_id, settings, survey)
            if backend.facts.info.exactness is not Exactness.INEXACT or name == names[-1]:
                return backend
            log.warning("backend not used", backend=name, model=model_id, reason="equal rows have different bits")
        except Unavailable as error:
            if name == names[-1]:
                raise ModelNotReady(f"backend: {error}") from error
            log.warning("backend not used", backend=name, model=model_id, reason=str(error), cause=cause_of(error))
    raise AssertionError("no backend")


def preload(settings: Settings) -> None:
    """Import what the configured models need, without touching a device; it takes seconds."""
    for _, location in settings.model_locations:
        names, _ = _split(location, settings)
        for name in names:  # the others are imported if this one cannot compute the model
            with suppress(Unavailable):
                BACKENDS[name]()
                break


def _split(location: str, settings: Settings) -> tuple[Sequence[str], str]:
    """Names of the backends to try in turn, and the location that they are given."""
    name, colon, rest = location.partition(":")
    if colon and name in BACKENDS:
        return [name], rest
    if settings.backend != "auto":
        return [settings.backend], location
    return AUTO[_kind_of_device(settings)], location


def _kind_of_device(settings: Settings) -> str:
    if settings.device != "auto":
        return settings.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
