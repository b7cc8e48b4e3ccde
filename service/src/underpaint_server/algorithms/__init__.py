"""One file per method, all of them generators of rows; and the tables that name them.

Adding a method: its options in ``jobs``, its rows in ``plans``, its file here, its line below; then its lines in
the tables of what it needs beforehand (``engine.methods``) and of its messages (``rpc.methods``).
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from underpaint_server.algorithms import ddim, diffedit, disentangle, edict, injection, sdedit
from underpaint_server.diffusion.tasks import Editing, Inverting, Outcome
from underpaint_server.jobs import (
    ContentInjection,
    DdimEdit,
    DdimInversion,
    DiffEdit,
    DisentangledEdit,
    EdictEdit,
    EdictInversion,
    SdEdit,
)
from underpaint_server.rows import Steps

INVERTERS: Mapping[type, Callable[[Inverting], Steps[dict[str, Tensor]]]] = {
    EdictInversion: edict.invert,
    DdimInversion: ddim.invert,
}
"""Options of an inversion -> source latents to the arrays of an inversion."""

RECONSTRUCTORS: Mapping[type, Callable[[Editing], Steps[Outcome]]] = {
    EdictInversion: edict.edit,
    DdimInversion: ddim.edit,
}
"""Options of an inversion -> the way back."""

EDITORS: Mapping[type, Callable[[Editing], Steps[Outcome]]] = {
    SdEdit: sdedit.edit,
    DdimEdit: ddim.edit,
    EdictEdit: edict.edit,
    DiffEdit: diffedit.edit,
    DisentangledEdit: disentangle.edit,
    ContentInjection: injection.edit,
}
"""Options of an edit -> inversion and target prompt to edited latents."""
