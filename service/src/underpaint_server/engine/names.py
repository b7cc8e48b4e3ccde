"""What a job is called in metrics and logs."""

from underpaint_server.jobs import (
    ContentInjection,
    DdimEdit,
    DiffEdit,
    DisentangledEdit,
    EdictEdit,
    EdictInversion,
    EditJob,
    InvertJob,
    Job,
    LearnJob,
    MaskJob,
    SdEdit,
)

METHODS: dict[type, str] = {
    SdEdit: "sdedit",
    DdimEdit: "ddim",
    EdictEdit: "edict",
    DiffEdit: "diffedit",
    DisentangledEdit: "disentangled",
    ContentInjection: "content_injection",
}
"""Options of an edit -> its name in ``Model.methods`` and in metrics."""


def method_name(job: Job) -> str:
    """The name of what a job runs: "edict", "invert_ddim", "mask", ..."""
    match job:
        case InvertJob():
            return "invert_edict" if isinstance(job.options.method, EdictInversion) else "invert_ddim"
        case EditJob():
            return METHODS[type(job.method)]
        case MaskJob():
            return "mask"
        case LearnJob():
            return "learn"
