"""What the engine gives a method and gets back: tasks, outcomes, and what ``prepare.py`` may say of a method."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from torch import Tensor

from underpaint_server.diffusion.sampling import Guidance
from underpaint_server.diffusion.schedule import Grid
from underpaint_server.jobs import EditJob, EditOptions, InversionMethod, InversionOptions, MaskJob, Notice
from underpaint_server.methods.base import part
from underpaint_server.methods.cost import used_steps
from underpaint_server.models.facts import Facts
from underpaint_server.rows import Steps

Options = TypeVar("Options")
Extra = TypeVar("Extra")


@dataclass(frozen=True, slots=True, eq=False)
class Inverting:
    """The way from an image to noise."""

    source: Tensor
    """(c, h, w), float64: the encoded image."""
    grid: Grid
    """Levels from the image's to the noisiest used."""
    guidance: Guidance
    options: InversionOptions


@dataclass(frozen=True, slots=True, eq=False)
class Editing(Generic[Options, Extra]):
    """The way back from noise to a changed image."""

    arrays: Mapping[str, Tensor]
    """Of the inversion (see ``jobs.Inversion.arrays``), float64; ``source`` alone where the method inverts nothing."""
    grid: Grid
    """Levels from the image's to the one that the arrays reach."""
    guidance: Guidance
    """Towards the target prompt."""
    noise: Callable[[str, int], Tensor]
    """(purpose, index) -> standard normal (c, h, w), float64."""
    inversion: InversionOptions | None
    """How the arrays were made; None where they are the noise that a generated source is drawn from."""
    options: Options
    """The method's own."""
    extra: Extra
    """What the method's ``prepare.py`` adds; None for a method without."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a method arrives at."""

    latents: Tensor
    """(c, h, w), float64, at the image's level."""
    mask: Tensor | None = None
    """(h, w), 1 = may change."""
    notices: tuple[Notice, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ComputedMask:
    """Where a method would change an image."""

    difference: Tensor
    """(h, w), normalised to [0, 1], before the cut."""
    mask: Tensor
    """(h, w), 1 = may change."""
    notices: tuple[Notice, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What is at hand when a method is prepared, beside its task."""

    job: EditJob | MaskJob
    embeds: Mapping[str, Tensor]
    """Prompt embeddings (tokens, width) by the role of their text, such as "target_prompt"."""
    model: Facts
    companion: Mapping[str, Tensor] | None = None
    """Arrays of the companion's inversion, where the job has a companion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation(Generic[Options, Extra]):
    """How the task of one method is made. What is left out is as it is for DDIM and EDICT."""

    texts: Callable[[Options], Mapping[str, str]] | None = None
    """Texts by role, in addition to the job's own or instead of them."""
    grid: Callable[[Options, Facts], Grid] | None = None
    """The levels of the edit, where the method decides them and not the inversion or the drawing."""
    extra: Callable[[Editing[Options, None], Context], Steps[Extra]] | None = None
    """``Editing.extra`` from the task without it."""
    mask: Callable[[Editing[Options, None], Context], Steps[ComputedMask]] | None = None
    """Only the mask; the task's arrays have the ``source`` alone, and its grid is empty."""


def editor(options: EditOptions) -> Callable[[Editing[Any, Any]], Steps[Outcome]]:
    """The generator of a method's edit."""
    return cast("Callable[[Editing[Any, Any]], Steps[Outcome]]", part(options.name, "steps").edit)


def preparation(options: EditOptions) -> Preparation[Any, Any]:
    """What a method's task needs beforehand."""
    prepare = part(options.name, "prepare")
    return Preparation() if prepare is None else cast("Preparation[Any, Any]", prepare.PREPARATION)


def inverter(method: InversionMethod) -> Callable[[Inverting], Steps[dict[str, Tensor]]]:
    """The generator of an inversion: its arrays from the source's latents."""
    return cast("Callable[[Inverting], Steps[dict[str, Tensor]]]", part(method.name, "steps").invert)


def reconstructor(method: InversionMethod) -> Callable[[Editing[None, None]], Steps[Outcome]]:
    """The generator of an inversion's way back."""
    return cast("Callable[[Editing[None, None]], Steps[Outcome]]", part(method.name, "steps").edit)


def inversion_grid(options: InversionOptions, model: Facts) -> Grid:
    """The levels that an inversion goes through."""
    steps = options.num_inference_steps
    return model.schedule.grid(steps, used_steps(steps, options.strength))
