"""DiffEdit's options and cost (Couairon, Verbeek, Schwenk, Cord; ICLR 2023)."""

from dataclasses import dataclass, field
from typing import ClassVar

from underpaint_server.jobs import EditJob, EditOptions, Phase, Picture
from underpaint_server.methods.base import Method
from underpaint_server.methods.cost import Plan, Stage, denoising_inversion
from underpaint_server.methods.ddim.options import DdimInversion


@dataclass(frozen=True, slots=True)
class DiffEdit(EditOptions):
    """Options of DiffEdit: compute a mask from two prompts, edit inside it, keep the rest."""

    name: ClassVar[str] = "diffedit"

    mask: Picture | None = field(repr=False)
    """(height, width), 0 or 255, of the source's size, 255 = may be edited; None computes the mask."""
    threshold: float
    """Threshold of the normalised difference, (0, 1)."""
    samples: int
    """Number of noise samples that the difference is averaged over, at least 1."""
    mask_strength: float
    """Share of the schedule that gives the noise level at which the predictions are compared, (0, 1)."""
    reference_prompt: str
    """Prompt that the target prompt is compared with; may be empty."""


def _cost(job: EditJob) -> Plan:
    options = job.method
    assert isinstance(options, DiffEdit)
    masking = _mask_cost(options) if options.mask is None else ()
    return masking + denoising_inversion(job)


def _mask_cost(options: DiffEdit) -> Plan:
    return (Stage(Phase.MASKING, 1, 2 * options.samples),)


METHOD = Method(
    options=DiffEdit,
    inversion=DdimInversion,
    cost=_cost,
    mask_cost=_mask_cost,
    starts_from_noise=False,
    needs_text=True,
)
