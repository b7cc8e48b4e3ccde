"""One file per method: how its message in an EditRequest is read and written; and the table that names them.

Adding a method: its file here, its line below.
"""

from collections.abc import Mapping
from typing import Any, Final

from underpaint_server.jobs import EditMethod
from underpaint_server.rpc.method import Method
from underpaint_server.rpc.methods import ddim, diffedit, disentangled, edict, injection, sdedit

METHODS: Final[Mapping[str, Method[Any]]] = {
    "sdedit": sdedit.METHOD,
    "ddim": ddim.METHOD,
    "edict": edict.METHOD,
    "diffedit": diffedit.METHOD,
    "disentangled": disentangled.METHOD,
    "content_injection": injection.METHOD,
}
"""Field of EditRequest -> the method."""

_NAMES: Final = {method.options: name for name, method in METHODS.items()}


def name_of(options: EditMethod) -> str:
    """The field of EditRequest that such options are sent in."""
    return _NAMES[type(options)]


def method_of(options: EditMethod) -> Method[Any]:
    """The method of such options."""
    return METHODS[name_of(options)]
