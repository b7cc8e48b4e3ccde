"""Underpaint: diffusion inversion and real-image editing, from Python.

::

    from underpaint import Client, Edict

    with Client("localhost:50051") as client:
        result = client.edit("apple.png", "a green apple", Edict(strength=0.8), source_prompt="a red apple")
        result.save("green.png")
"""

from underpaint.aio import AsyncClient
from underpaint.client import Client
from underpaint.errors import UnderpaintError
from underpaint.methods import (
    ContentInjection,
    Convention,
    Ddim,
    DdimInversion,
    DiffEdit,
    Edict,
    EdictInversion,
    EditMethod,
    Fit,
    Generated,
    Interpolation,
    InversionMethod,
    Priority,
    SdEdit,
)
from underpaint.results import (
    Edited,
    Fitting,
    Inversion,
    InversionHandle,
    Limits,
    Mask,
    Model,
    ModelState,
    Notice,
    Phase,
    Preview,
    Progress,
    Resolved,
    Usage,
)

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "Client",
    "ContentInjection",
    "Convention",
    "Ddim",
    "DdimInversion",
    "DiffEdit",
    "Edict",
    "EdictInversion",
    "EditMethod",
    "Edited",
    "Fit",
    "Fitting",
    "Generated",
    "Interpolation",
    "Inversion",
    "InversionHandle",
    "InversionMethod",
    "Limits",
    "Mask",
    "Model",
    "ModelState",
    "Notice",
    "Phase",
    "Preview",
    "Priority",
    "Progress",
    "Resolved",
    "SdEdit",
    "UnderpaintError",
    "Usage",
    "__version__",
    "errors",
]
