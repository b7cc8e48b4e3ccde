"""Families of checkpoints: the interface that the torch backend uses, and the table of those that can be loaded.

To add a family, add a module to this package and its pipeline classes to :data:`FAMILIES`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from diffusers import ModelMixin
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from underpaint_server.diffusion.schedule import Schedule
from underpaint_server.errors import ModelNotReady
from underpaint_server.models.checkpoint import Checkpoint
from underpaint_server.models.facts import About
from underpaint_server.models.graphs import Function, Graph
from underpaint_server.rows import Denoise, Embedded

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()


class Family(Protocol):
    """One loaded checkpoint: the network, which predicts epsilon, and the autoencoder and text encoder, if any."""

    @property
    def unet(self) -> ModelMixin:
        """The denoising network; its middle and up blocks are the feature sites."""
        ...

    @property
    def graphs(self) -> Mapping[str, Graph]:
        """Its networks, by name; the one that predicts noise is :data:`graphs.UNET`."""
        ...

    @property
    def compute(self) -> dict[str, Function]:
        """Name of a graph -> what computes it: at first its own module. A runtime puts what it has compiled there."""
        ...

    @property
    def schedule(self) -> Schedule:
        """The noise schedule that it was trained with."""
        ...

    @property
    def digest(self) -> str:
        """sha256 (hex) of what was read of the checkpoint, see :meth:`Checkpoint.digest`."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of latents."""
        ...

    @property
    def vae_scale(self) -> int:
        """Pixels per latent in each direction; 1 without an autoencoder."""
        ...

    @property
    def size_multiple(self) -> int:
        """Image sides must be multiples of this many pixels, so that every level of the U-Net halves evenly."""
        ...

    @property
    def native_px(self) -> tuple[int, int]:
        """(width, height) in pixels that the network was trained at, rounded to multiples of ``size_multiple``."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Length of the text encoder's context, start and end tokens included; 0 without a text encoder."""
        ...

    @property
    def embeds_shape(self) -> tuple[int, int]:
        """(tokens, width) of prompt embeddings; (0, 0) without a text encoder."""
        ...

    @property
    def about(self) -> About:
        """Description of the checkpoint."""
        ...

    def noise_preds(self, rows: list[Denoise]) -> Tensor:
        """Epsilon of each row, (b, c, h, w), float64, from one forward pass."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] to latents (b, c, h, w), float64. Raises NonFiniteLatents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, c, h, w) to images (b, 3, H, W), float32, clamped to [-1, 1]. Raises NonFiniteLatents."""
        ...

    def embed(self, texts: list[str]) -> list[Embedded]:
        """The prompt embeddings of ``texts``, in their order, from one pass. Raises NonFiniteLatents."""
        ...


Loader = Callable[[Checkpoint, torch.dtype, torch.device], Family]


def _stable_diffusion(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Family:
    from underpaint_server.models.stable_diffusion import StableDiffusion

    return StableDiffusion.load(checkpoint, dtype=dtype, device=device)


def _ddpm(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Family:
    from underpaint_server.models.ddpm import Ddpm

    return Ddpm.load(checkpoint, dtype=dtype, device=device)


FAMILIES: Mapping[str, Loader] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionImg2ImgPipeline": _stable_diffusion,
    "StableDiffusionInpaintPipeline": _stable_diffusion,
    "DDPMPipeline": _ddpm,
    "DDIMPipeline": _ddpm,
}
"""``_class_name`` of a pipeline directory's model_index.json -> loader (checkpoint, dtype, device)."""


def load(directory: Path, *, dtype: torch.dtype, device: torch.device) -> Family:
    """Load a pipeline directory; raises :class:`ModelNotReady` if it cannot be read or is not supported.

    ``dtype`` is that of the denoising network.
    """
    checkpoint = Checkpoint(directory)
    pipeline = checkpoint.index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in FAMILIES:
        raise ModelNotReady(
            f"'{directory}/model_index.json': _class_name is {pipeline!r}; give a pipeline of a supported class: "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[pipeline](checkpoint, dtype, device)
