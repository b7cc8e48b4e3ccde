"""EDICT's options and cost (Wallace, Gokul, Naik; CVPR 2023; arXiv 2211.12446)."""

from dataclasses import dataclass
from typing import ClassVar

from underpaint_server.jobs import EditOptions, InversionMethod
from underpaint_server.methods.base import Method
from underpaint_server.methods.cost import denoising_inversion


@dataclass(frozen=True, slots=True)
class EdictInversion(InversionMethod):
    """Exact inversion with coupled latents."""

    name: ClassVar[str] = "edict"
    label: ClassVar[str] = "EDICT"
    evaluations_per_step: ClassVar[int] = 2
    exact: ClassVar[bool] = True
    default_guidance_scale: ClassVar[float] = 3.0

    mixing_coefficient: float = 0.93
    """EDICT's p, (0, 1]. Each inversion step multiplies the difference of the coupled latents by p^-2, so more steps
    need a p closer to 1."""


@dataclass(frozen=True, slots=True)
class EdictEdit(EditOptions):
    """Denoise an EDICT inversion with the target prompt. It has no options."""

    name: ClassVar[str] = "edict"


METHOD = Method(options=EdictEdit, inversion=EdictInversion, cost=denoising_inversion)
