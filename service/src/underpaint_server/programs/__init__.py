"""Programs: each turns a job into one generator of rows, which encodes, inverts, edits and decodes."""

from underpaint_server.jobs import EditJob, InvertJob, Job, LearnJob, MaskJob, Result
from underpaint_server.models.facts import Facts
from underpaint_server.programs.edit import edit
from underpaint_server.programs.invert import invert
from underpaint_server.programs.learn import learn
from underpaint_server.programs.mask import compute_mask
from underpaint_server.rows import Steps


def program(job: Job, model: Facts) -> Steps[Result]:
    """The generator that computes the result of ``job``. The engine fills in its ``usage``, which is empty here."""
    match job:
        case InvertJob():
            return invert(job, model)
        case EditJob():
            return edit(job, model)
        case MaskJob():
            return compute_mask(job, model)
        case LearnJob():
            return learn(job, model)
