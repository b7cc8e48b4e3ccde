"""Tasks and outcomes of a method in the engine process, and the type of ``PREPARATION`` in ``prepare.py``."""

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
    """The task of inverting an image."""

    source: Tensor
    """(c, h, w), float64: the encoded image."""
    grid: Grid
    """Levels from that of the image to the noisiest used one."""
    guidance: Guidance
    """With the source prompt."""
    options: InversionOptions


@dataclass(frozen=True, slots=True, eq=False)
class Editing(Generic[Options, Extra]):
    """The task of denoising to an edited image."""

    arrays: Mapping[str, Tensor]
    """Of the inversion, see ``jobs.Inversion.arrays``; only ``source`` where the method inverts nothing."""
    grid: Grid
    """Levels from that of the image to the noisiest one of the arrays."""
    guidance: Guidance
    """With the target prompt and the negative prompt."""
    noise: Callable[[str, int], Tensor]
    """(purpose, index) -> standard normal (c, h, w), float64, see ``diffusion.noise``."""
    inversion: InversionOptions | None
    """How the source is inverted, or would be if it is generated; None where the method has no inversion."""
    options: Options
    """Of the method."""
    extra: Extra
    """What the ``extra`` of the method's preparation returned; None where it has none."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Result of a method."""

    latents: Tensor
    """(c, h, w), float64: the edited image, encoded."""
    mask: Tensor | None = None
    """(h, w), 1 = was edited; None where the method has no mask."""
    notices: tuple[Notice, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ComputedMask:
    """The mask that a method computed."""

    difference: Tensor
    """(h, w), normalised to [0, 1], before the threshold."""
    mask: Tensor
    """(h, w), 1 = may be edited."""
    notices: tuple[Notice, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """Input of preparing a method, in addition to its task."""

    job: EditJob | MaskJob
    embeds: Mapping[str, Tensor]
    """Prompt embeddings (tokens, width) by the role of their text, such as "target_prompt"."""
    model: Facts
    companion: Mapping[str, Tensor] | None = None
    """Arrays of the companion's inversion; None where the job has no companion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation(Generic[Options, Extra]):
    """How the task of one method is made. What is None is done as for DDIM and EDICT."""

    texts: Callable[[Options], Mapping[str, str]] | None = None
    """Prompts by role, which are added to those of the job or replace them."""
    grid: Callable[[Options, Facts], Grid] | None = None
    """The levels of the edit. By default they are those of the job's inversion."""
    extra: Callable[[Editing[Options, None], Context], Steps[Extra]] | None = None
    """Computes ``Editing.extra``, from the task without it."""
    mask: Callable[[Editing[Options, None], Context], Steps[ComputedMask]] | None = None
    """Computes only the mask; the task's arrays have only ``source``, and its grid is empty."""


def editor(options: EditOptions) -> Callable[[Editing[Any, Any]], Steps[Outcome]]:
    """The generator function of a method: ``edit`` in its ``steps.py``."""
    return cast("Callable[[Editing[Any, Any]], Steps[Outcome]]", part(options.name, "steps").edit)


def preparation(options: EditOptions) -> Preparation[Any, Any]:
    """The ``PREPARATION`` of a method, the default one if it has no ``prepare.py``."""
    prepare = part(options.name, "prepare")
    return Preparation() if prepare is None else cast("Preparation[Any, Any]", prepare.PREPARATION)


def inverter(method: InversionMethod) -> Callable[[Inverting], Steps[dict[str, Tensor]]]:
    """The generator function of an inversion, which returns its arrays: ``invert`` in its ``steps.py``."""
    return cast("Callable[[Inverting], Steps[dict[str, Tensor]]]", part(method.name, "steps").invert)


def noise_arrays(method: type[InversionMethod], noise: Tensor) -> dict[str, Tensor]:
    """The arrays of an inversion that ends at this noise (c, h, w), float64: what a generated source starts from."""
    return cast("dict[str, Tensor]", part(method.name, "steps").from_noise(noise))


def reconstructor(method: InversionMethod) -> Callable[[Editing[None, None]], Steps[Outcome]]:
    """The generator function that reconstructs the source from an inversion: ``edit`` in its ``steps.py``."""
    return cast("Callable[[Editing[None, None]], Steps[Outcome]]", part(method.name, "steps").edit)


def inversion_grid(options: InversionOptions, model: Facts) -> Grid:
    """The levels of an inversion."""
    steps = options.num_inference_steps
    return model.schedule.grid(steps, used_steps(steps, options.strength))
