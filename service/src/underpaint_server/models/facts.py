"""What methods, programs and the engine know about a loaded model: its sizes, its noise schedule and its device."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from underpaint_server.diffusion.schedule import Schedule
from underpaint_server.jobs import ModelInfo


@dataclass(frozen=True, slots=True)
class About:
    """Description of a checkpoint for check-model's report and the log; nothing is decided by it."""

    family: str = "unknown"
    """For example "stable-diffusion" or "ddpm"."""
    prediction: str = "epsilon"
    """What the network was trained to predict: "epsilon", "v_prediction" or "sample"."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Part of the model, for example "network" -> number of its parameters."""
    remarks: tuple[str, ...] = ()
    """Sentences: what was read differently than the files say, and what was not used."""


@dataclass(frozen=True, slots=True)
class Facts:
    """One loaded model, without its networks."""

    info: ModelInfo
    schedule: Schedule
    """Noise schedule that the network was trained with."""
    latent_channels: int
    """Channels of latents."""
    vae_scale: int
    """Pixels per latent in each direction; 1 without an autoencoder."""
    device: torch.device
    """Device of the networks and of a job's latents."""
    about: About = About()

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of an image; ``width`` and ``height`` are in pixels."""
        return self.latent_channels, height // self.vae_scale, width // self.vae_scale
