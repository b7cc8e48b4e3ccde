"""Underpaint: diffusion inversion and real-image editing with a gRPC server.

::

    from underpaint import Client, Edict

    with Client("localhost:50051") as client:
        result = client.edit("apple.png", "a green apple", Edict(strength=0.8), source_prompt="a red apple")
        result.save("green.png")
"""

from underpaint._version import __version__
from underpaint.aio import AsyncClient, AsyncLearning
from underpaint.client import Client, Learning
from underpaint.errors import UnderpaintError
from underpaint.methods import (
    ContentInjection,
    Convention,
    Ddim,
    DdimInversion,
    DiffEdit,
    Disentangled,
    Edict,
    EdictInversion,
    EditMethod,
    Fit,
    Generated,
    GradientLearning,
    Interpolation,
    InversionMethod,
    LearnMethod,
    Priority,
    Sampler,
    SdEdit,
    SearchLearning,
)
from underpaint.results import (
    Direction,
    Edited,
    ExactBatching,
    Fitting,
    Inversion,
    InversionHandle,
    Limits,
    Mask,
    Model,
    ModelState,
    Notice,
    Operation,
    Phase,
    Preview,
    Progress,
    Resolved,
    Usage,
)

__all__ = [
    "AsyncClient",
    "AsyncLearning",
    "Client",
    "ContentInjection",
    "Convention",
    "Ddim",
    "DdimInversion",
    "DiffEdit",
    "Direction",
    "Disentangled",
    "Edict",
    "EdictInversion",
    "EditMethod",
    "Edited",
    "ExactBatching",
    "Fit",
    "Fitting",
    "Generated",
    "GradientLearning",
    "Interpolation",
    "Inversion",
    "InversionHandle",
    "InversionMethod",
    "LearnMethod",
    "Learning",
    "Limits",
    "Mask",
    "Model",
    "ModelState",
    "Notice",
    "Operation",
    "Phase",
    "Preview",
    "Priority",
    "Progress",
    "Resolved",
    "Sampler",
    "SdEdit",
    "SearchLearning",
    "UnderpaintError",
    "Usage",
    "__version__",
    "errors",
]
