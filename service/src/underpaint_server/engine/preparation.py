"""What a method is given beyond source, texts and noise; ``methods`` has one file for each that needs something."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from underpaint_server.diffusion.schedule import Grid
from underpaint_server.diffusion.tasks import Editing
from underpaint_server.engine.parts import Texts
from underpaint_server.jobs import EditJob, EditMethod
from underpaint_server.models.facts import Facts
from underpaint_server.rows import Steps

Options = TypeVar("Options", bound=EditMethod)


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """What is at hand when a method is prepared; the source and the noise are in the task."""

    job: EditJob
    texts: Texts
    model: Facts
    content: Mapping[str, Tensor] | None
    """Arrays of the content's inversion, where the job has a content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation(Generic[Options]):
    """How the task of one method is made. What is left out is as it is for DDIM and EDICT."""

    starts_from_noise: bool = True
    """Whether the edit of a picture that the model draws starts from that noise; else the picture is drawn first."""
    texts: Callable[[Options], Mapping[str, str]] | None = None
    """Texts by role, in addition to the job's own or instead of them."""
    grid: Callable[[Options, Facts], Grid] | None = None
    """The levels of the edit, where the method decides them and not the inversion or the drawing."""
    task: Callable[[Editing, Options, Ready], Steps[Editing]] | None = None
    """The task with what only this method has."""
