"""Edit methods and inversion methods: one folder each (see ``base``), and the tables of all of them.

To add a method, add its folder and its entry in ``METHODS``.
"""

from collections.abc import Mapping
from typing import Any

from underpaint_server.jobs import EditJob, InversionMethod, InvertJob, Job, LearnJob, MaskJob
from underpaint_server.methods.base import Method
from underpaint_server.methods.content_injection.options import METHOD as CONTENT_INJECTION
from underpaint_server.methods.ddim.options import METHOD as DDIM
from underpaint_server.methods.diffedit.options import METHOD as DIFFEDIT
from underpaint_server.methods.disentangled.options import METHOD as DISENTANGLED
from underpaint_server.methods.edict.options import METHOD as EDICT
from underpaint_server.methods.sdedit.options import METHOD as SDEDIT

METHODS: Mapping[str, Method[Any]] = {
    method.name: method for method in (SDEDIT, DDIM, EDICT, DIFFEDIT, DISENTANGLED, CONTENT_INJECTION)
}
"""Name -> edit method, in the order of Model.methods."""

INVERSIONS: Mapping[str, type[InversionMethod]] = {
    method.inversion.name: method.inversion for method in METHODS.values() if method.inversion is not None
}
"""Name -> class of an inversion method's options."""

JOB_NAMES = (*METHODS, *(f"invert_{name}" for name in INVERSIONS), "mask", "learn")
"""Every value of :func:`job_name`."""


def methods_for(*, reads_text: bool) -> tuple[str, ...]:
    """Names of the methods that a model with (``reads_text``) or without a text encoder can run."""
    return tuple(name for name, method in METHODS.items() if reads_text or not method.needs_text)


def job_name(job: Job) -> str:
    """Label of a job in metrics and logs: "edict", "invert_ddim", "mask", "learn", ..."""
    match job:
        case InvertJob():
            return f"invert_{job.options.method.name}"
        case EditJob():
            return job.method.name
        case MaskJob():
            return "mask"
        case LearnJob():
            return "learn"
