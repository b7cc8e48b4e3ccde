"""What an algorithm may know of a model: everything but the network."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from underpaint_server.diffusion.schedule import Schedule
from underpaint_server.jobs import ModelInfo


@dataclass(frozen=True, slots=True)
class About:
    """What kind of checkpoint a model is, for people; nothing is decided by it."""

    family: str = "unknown"
    """Such as "stable-diffusion"."""
    prediction: str = "epsilon"
    """What the network itself was trained to predict."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Number of weights by part, such as "network"."""


@dataclass(frozen=True, slots=True)
class Facts:
    """One loaded model, as seen by whoever plans work for it."""

    info: ModelInfo
    schedule: Schedule
    latent_channels: int
    vae_scale: int
    """Pixels a latent is wide and high."""
    device: torch.device
    """Where latent state lives."""
    about: About = About()

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of a picture of that size in pixels."""
        return self.latent_channels, height // self.vae_scale, width // self.vae_scale
