"""Which kind of checkpoint a directory holds, and what the torch backend asks of any of them.

Adding a family: its file here, its line below.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from underpaint_server.diffusion.schedule import Schedule
from underpaint_server.errors import ModelNotReady
from underpaint_server.models import checkpoint
from underpaint_server.models.facts import About
from underpaint_server.models.libraries import ModelMixin
from underpaint_server.rows import Denoise, Embedded


class Family(Protocol):
    """One checkpoint in memory, whatever it is inside: predicts epsilon, works on latents, shows pictures."""

    @property
    def unet(self) -> ModelMixin:
        """The network of ``noise_preds``; its blocks are the feature sites."""
        ...

    @property
    def schedule(self) -> Schedule:
        """The levels it was trained on."""
        ...

    @property
    def digest(self) -> str:
        """sha256 over everything that was read."""
        ...

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the edit methods that make sense for it."""
        ...

    @property
    def latent_channels(self) -> int:
        """Of what the network sees."""
        ...

    @property
    def vae_scale(self) -> int:
        """Pixels a latent is wide and high."""
        ...

    @property
    def size_multiple(self) -> int:
        """Pixels that a side must be a multiple of, so that every level of the network has whole sizes."""
        ...

    @property
    def native_px(self) -> tuple[int, int]:
        """(width, height) in pixels that the network was made for."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Length of the text encoder's context, markers included; 0 where no text is read."""
        ...

    @property
    def embeds_shape(self) -> tuple[int, int]:
        """(tokens, width) of a text's embedding; zeros where no text is read."""
        ...

    @property
    def about(self) -> About:
        """What kind of checkpoint it is, for people."""
        ...

    def noise_preds(self, rows: list[Denoise]) -> Tensor:
        """(b, c, h, w), float64: epsilon of each row, one forward pass."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] to latents (b, c, h, w), float64."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, c, h, w) to images (b, 3, H, W), float32, cut to [-1, 1]."""
        ...

    def embed(self, texts: list[str]) -> list[Embedded]:
        """The texts' embeddings, one pass."""
        ...


Loader = Callable[[Path, torch.dtype, torch.device], Family]


def _stable_diffusion(directory: Path, dtype: torch.dtype, device: torch.device) -> Family:
    from underpaint_server.models.stable_diffusion import StableDiffusion

    return StableDiffusion.load(directory, dtype=dtype, device=device)


def _ddpm(directory: Path, dtype: torch.dtype, device: torch.device) -> Family:
    from underpaint_server.models.ddpm import Ddpm

    return Ddpm.load(directory, dtype=dtype, device=device)


FAMILIES: Mapping[str, Loader] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionImg2ImgPipeline": _stable_diffusion,
    "StableDiffusionInpaintPipeline": _stable_diffusion,
    "DDPMPipeline": _ddpm,
    "DDIMPipeline": _ddpm,
}
"""The ``_class_name`` of a pipeline directory's model_index.json -> who reads it."""


def load(directory: Path, *, dtype: torch.dtype, device: torch.device) -> Family:
    """Read a pipeline directory; raises :class:`ModelNotReady`, saying what is wrong with it."""
    pipeline = checkpoint.config(directory / "model_index.json").get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in FAMILIES:
        raise ModelNotReady(f"'{directory}' holds a {pipeline}; this server reads {', '.join(FAMILIES)}")
    return FAMILIES[pipeline](directory, dtype, device)
