"""DDIM's options and cost (Song, Meng, Ermon; ICLR 2021)."""

from dataclasses import dataclass
from typing import ClassVar

from underpaint_server.jobs import DdimConvention, EditOptions, InversionMethod
from underpaint_server.methods.base import Method
from underpaint_server.methods.cost import denoising_inversion


@dataclass(frozen=True, slots=True)
class DdimInversion(InversionMethod):
    """DDIM sampling run backwards. It is an approximation; DiffEdit and content injection use its trajectory too."""

    name: ClassVar[str] = "ddim"
    label: ClassVar[str] = "DDIM"
    evaluations_per_step: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    default_guidance_scale: ClassVar[float] = 1.0

    convention: DdimConvention = DdimConvention.TARGET
    features: tuple[str, ...] = ()
    """Feature sites whose activations are stored, for content injection."""


@dataclass(frozen=True, slots=True)
class DdimEdit(EditOptions):
    """Denoise a DDIM inversion with the target prompt. It has no options."""

    name: ClassVar[str] = "ddim"


METHOD = Method(options=DdimEdit, inversion=DdimInversion, cost=denoising_inversion)
