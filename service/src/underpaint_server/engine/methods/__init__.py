"""One file per method that needs something before it runs; and the table that names them.

The methods themselves are in ``algorithms``. Adding a method: its file here if it needs one, its line below.
"""

from collections.abc import Mapping
from typing import Any

from underpaint_server.engine.methods import diffedit, disentangled, injection, sdedit
from underpaint_server.engine.preparation import Preparation
from underpaint_server.jobs import ContentInjection, DdimEdit, DiffEdit, DisentangledEdit, EdictEdit, SdEdit

PREPARATIONS: Mapping[type, Preparation[Any]] = {
    SdEdit: sdedit.PREPARATION,
    DdimEdit: Preparation(),
    EdictEdit: Preparation(),
    DiffEdit: diffedit.PREPARATION,
    DisentangledEdit: disentangled.PREPARATION,
    ContentInjection: injection.PREPARATION,
}
"""Options of an edit -> what its task needs."""
