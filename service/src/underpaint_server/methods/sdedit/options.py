"""SDEdit's options and cost (Meng et al., ICLR 2022)."""

from dataclasses import dataclass
from typing import ClassVar

from underpaint_server.jobs import EditJob, EditOptions, Phase
from underpaint_server.methods.base import Method
from underpaint_server.methods.cost import Plan, Stage, guided_edit, used_steps


@dataclass(frozen=True, slots=True)
class SdEdit(EditOptions):
    """Options of SDEdit: add noise to the image, denoise with the target prompt."""

    name: ClassVar[str] = "sdedit"

    strength: float
    """Share of the schedule that is run, (0, 1]; it decides the noise level to start from."""
    num_inference_steps: int
    """Steps of the whole schedule, at least 1."""


def _cost(job: EditJob) -> Plan:
    options = job.method
    assert isinstance(options, SdEdit)
    steps = used_steps(options.num_inference_steps, options.strength)
    return (Stage(Phase.DENOISING, steps, guided_edit(job)),)


METHOD = Method(options=SdEdit, cost=_cost, starts_from_noise=False)
