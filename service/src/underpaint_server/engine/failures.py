"""What a caller is told when a job fails: the error, completed by what only the job knows."""

from collections.abc import Iterator
from typing import Any, Final

import structlog

from underpaint_server.errors import (
    Bug,
    FieldViolation,
    ModelNonFinite,
    NonFiniteLatents,
    OutOfMemory,
    UnderpaintError,
)
from underpaint_server.jobs import EditJob, Generated, InvertJob, Job, LearnJob, Photo, Source, Stored

_log = structlog.get_logger(__name__)

_USUAL: Final = {
    "guidance_scale": (0.0, 15.0),
    "mixing_coefficient": (0.9, 1.0),
    "num_inference_steps": (1, 100),
    "weights": (-1.5, 1.5),
    "late_weight": (-1.5, 1.5),
    "learning_rate": (0.0, 0.2),
}
"""Field -> range in which it does not make latents grow without limit; values outside explain that they did."""

_NAMES: Final = {"num_inference_steps": "steps"}
"""Names in requests, where they differ."""


def reported(error: Exception, id_: int, job: Job) -> UnderpaintError:
    """The error to report for job ``id_``. Text of an unknown error stays in the log: it may name files."""
    match error:
        case NonFiniteLatents():
            return _explained(error, job)
        case OutOfMemory():
            width, height = max((_size(source) for source in _sources(job)), key=lambda size: size[0] * size[1])
            metadata = {**error.metadata, "width": str(width), "height": str(height)}
            return OutOfMemory(f"{error.message} (the image has {width}x{height} pixels)", metadata=metadata)
        case UnderpaintError():
            return error
    _log.error("job failed", job=id_, exc_info=error)
    return Bug(f"internal error of the engine; the server log has it as job {id_}")


def _explained(error: NonFiniteLatents, job: Job) -> UnderpaintError:
    """The same error with the fields that explain it; :class:`ModelNonFinite` if there are none."""
    violations = tuple(_extremes(job))
    if not violations:
        return ModelNonFinite(error.message)
    return NonFiniteLatents(error.message, violations=violations)


def _extremes(job: Job) -> Iterator[FieldViolation]:
    for prefix, values in _asked(job):
        for name, (low, high) in _USUAL.items():
            value = getattr(values, name, None)
            worst = max(value, key=abs, default=None) if isinstance(value, tuple) else value
            if worst is not None and not low <= worst <= high:
                path = f"{prefix}{_NAMES.get(name, name)}"
                yield FieldViolation(path, f"{worst:g} is extreme; usual is {low:g} to {high:g}")


def _asked(job: Job) -> Iterator[tuple[str, Any]]:
    """The options of a job, each with the path of their fields in the request."""
    match job:
        case LearnJob(options=options):
            steps = options.num_inference_steps
            yield "direction.", _Only(guidance_scale=options.guidance_scale, num_inference_steps=steps)
            yield "", _Only(late_weight=options.late_weight)
            yield "", options.method
        case InvertJob(options=options):
            yield "parameters.", options
            yield f"parameters.{options.method.name}.", options.method
        case _:
            yield "", job
            yield f"{job.method.name}.", job.method
            if isinstance(job.source, Generated):
                yield "generated.", job.source
            elif job.inversion is not None:
                path = "inversion." if isinstance(job.source, Stored) else "inversion_parameters."
                yield path, job.inversion
                yield f"{path}{job.inversion.method.name}.", job.inversion.method


class _Only:
    """Some fields of options that are elsewhere in the request than the others."""

    def __init__(self, **values: float) -> None:
        self.__dict__.update(values)


def _sources(job: Job) -> tuple[Source, ...]:
    match job:
        case LearnJob(examples=examples):
            return examples
        case EditJob(companion=companion) if companion is not None:
            return (job.source, companion.source)
        case _:
            return (job.source,)


def _size(source: Source) -> tuple[int, int]:
    match source:
        case Photo(pixels=pixels):
            return pixels.shape[1], pixels.shape[0]
        case Stored(inversion=inversion):
            return inversion.width, inversion.height
        case Generated(width=width, height=height):
            return width, height
