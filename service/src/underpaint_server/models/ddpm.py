"""The DDPM family (Ho, Jain, Abbeel; NeurIPS 2020): unconditional diffusion on pixels, in a diffusers directory.

There is no autoencoder: latents are the image itself in [-1, 1]. There is no text encoder: prompts are empty, and
classifier-free guidance has no effect. Denoising an inversion therefore only reconstructs its image; an edit needs
added noise (SDEdit) or the features of another image (content injection).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from torch import Tensor

from underpaint_server.diffusion.schedule import Schedule
from underpaint_server.errors import ModelNotReady
from underpaint_server.models import schedules
from underpaint_server.models.checkpoint import DIFFUSERS, Checkpoint
from underpaint_server.models.facts import About
from underpaint_server.models.graphs import UNET, Function, Graph, Input, Wrapped, functions, latents
from underpaint_server.models.networks import check_conditioning, native_px
from underpaint_server.models.tensors import finite, to_device
from underpaint_server.rows import Denoise, Embedded

CHANNELS = 3


@dataclass(frozen=True, slots=True, eq=False)
class Ddpm:
    """One loaded checkpoint; see :class:`underpaint_server.models.families.Family`."""

    unet: UNet2DModel
    reading: schedules.Reading
    native_px: tuple[int, int]
    digest: str
    remarks: tuple[str, ...]
    graphs: Mapping[str, Graph]
    compute: dict[str, Function]
    latent_channels: int = CHANNELS
    vae_scale: int = 1
    prompt_tokens: int = 0
    embeds_shape: tuple[int, int] = (0, 0)

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> "Ddpm":
        """Load a pipeline directory; raises :class:`ModelNotReady` if it cannot be read or is not supported."""
        reading = schedules.read(checkpoint.scheduler(), checkpoint.named_class("scheduler"), latent=False)
        unet: UNet2DModel = checkpoint.model("unet", UNet2DModel, DIFFUSERS, dtype)
        _check(unet)
        native, rounded = native_px(unet.config, 1, unet.config.sample_size)
        unet.requires_grad_(False).eval().to(device)
        remarks = (*reading.remarks, *rounded, *checkpoint.remarks())
        graphs = _graphs(unet)
        return cls(unet, reading, native, checkpoint.digest(reading.implied), remarks, graphs, functions(graphs))

    @property
    def schedule(self) -> Schedule:
        """The noise schedule that the U-Net was trained with."""
        return self.reading.schedule

    @property
    def size_multiple(self) -> int:
        """Image sides must be multiples of this many pixels, so that every level of the U-Net halves evenly."""
        return 1 << (len(self.unet.config.block_out_channels) - 1)

    @property
    def about(self) -> About:
        """Description of the checkpoint."""
        parameters = {"network": sum(weights.numel() for weights in self.unet.parameters())}
        return About("ddpm", self.reading.prediction.value, parameters, self.remarks)

    def noise_preds(self, rows: list[Denoise]) -> Tensor:
        """Epsilon of each row, (b, 3, h, w), float64, from one forward pass."""
        weight = self.unet.conv_in.weight
        latents = torch.stack([row.latents for row in rows])
        timesteps = to_device(torch.tensor([row.timestep for row in rows]), weight.device)
        out = self.compute[UNET](latents.to(weight.dtype), timesteps).double()
        noise_preds = schedules.to_epsilon(self.reading.prediction, rows, latents, out)
        return schedules.clipped(self.reading.clip, rows, latents, noise_preds)

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1], unchanged, as float64 on the model's device."""
        return images.to(self.unet.device).double()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, 3, H, W) as images: float32, clamped to [-1, 1]."""
        return finite(latents.float(), "the network").clamp(-1, 1)

    def embed(self, texts: list[str]) -> list[Embedded]:
        """Embeddings (0, 0), one per text: the model reads no text."""
        return [Embedded(torch.zeros(self.embeds_shape), "") for _ in texts]


def _check(unet: UNet2DModel) -> None:
    config = unet.config
    if config.in_channels != CHANNELS or config.out_channels != CHANNELS:
        raise ModelNotReady(
            f"unet/config.json: the U-Net has {config.in_channels} input and {config.out_channels} output channels; "
            f"give one with {CHANNELS} and {CHANNELS}: learned variances are not supported"
        )
    check_conditioning(config)


def _graphs(unet: UNet2DModel) -> dict[str, Graph]:
    unit = 1 << (len(unet.config.block_out_channels) - 1)

    def denoise(latents: Tensor, timesteps: Tensor) -> Tensor:
        out: Tensor = unet(latents, timesteps, return_dict=False)[0]
        return out

    inputs = (latents(CHANNELS, unit, unet.dtype), Input("timesteps", dtype=torch.int64))
    return {UNET: Graph(Wrapped(denoise, unet), inputs)}
