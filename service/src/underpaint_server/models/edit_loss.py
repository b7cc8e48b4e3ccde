"""The loss of learned directions: how far an edited image is from the change that two prompts describe.

Its directional part compares, in CLIP's space, the change of the image with the change of the prompt. Its content part
compares features of the edited and the unedited image (Wu et al., CVPR 2023, eq. 7).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from underpaint_server.errors import ModelNotReady
from underpaint_server.models.clip import Clip
from underpaint_server.rows import Score, Scored

FAINT = 1e-2
"""Smoothing of the length of an image change in CLIP's space, ``sqrt(length^2 + FAINT^2)``. Without it the derivative
at an unchanged image is infinite, and one such step makes Adam's running means useless for all later steps."""

Features = Callable[[Tensor], list[Tensor]]
"""Function from images (b, 3, H, W) in [-1, 1] to activations (b, ...), from the first layer to the last."""

_VGG_BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21))
"""Indices of VGG16's convolutions in torchvision's ``features``, by block; a pooling layer separates two blocks."""


@dataclass(frozen=True, slots=True, eq=False)
class EditLoss:
    """Directional CLIP loss (Gal et al., 2022) and content loss (Wu et al., CVPR 2023, eq. 7)."""

    name: str
    """Network whose features the content loss compares: "vae" or "vgg16"."""
    clip: Clip
    features: Features

    def scores(self, rows: Sequence[Score]) -> list[Scored]:
        """Results of ``rows``, in their order, from one pass; images of one size."""
        any_gradient = any(row.gradient for row in rows)
        images = torch.stack([row.image for row in rows]).requires_grad_(any_gradient)
        references = torch.stack([row.reference for row in rows])
        directional = self._directional(images, references, rows)
        content = self._content(images, references)
        weights = torch.tensor([row.content_weight for row in rows], device=images.device)
        gradients: Sequence[Tensor | None] = [None] * len(rows)
        if any_gradient:
            (by_images,) = torch.autograd.grad((directional + weights * content).sum(), images)
            gradients = [image if row.gradient else None for row, image in zip(rows, by_images, strict=True)]
        losses = zip(directional.tolist(), content.tolist(), gradients, strict=True)
        return [Scored(*parts) for parts in losses]

    def _directional(self, images: Tensor, references: Tensor, rows: Sequence[Score]) -> Tensor:
        """1 - cosine similarity of the image changes and the text changes, (b,)."""
        with torch.no_grad():
            reference_embeds = self.clip.image_embeds(references)
        text_change = self.clip.text_embeds([row.target_text for row in rows]) - self.clip.text_embeds(
            [row.source_text for row in rows]
        )
        image_change = self.clip.image_embeds(images) - reference_embeds
        length = (image_change.square().sum(1) + FAINT**2).sqrt()
        return 1 - (image_change * functional.normalize(text_change, dim=1)).sum(1) / length

    def _content(self, images: Tensor, references: Tensor) -> Tensor:
        """Sum over layers of the mean absolute difference, divided by the reference's mean magnitude; (b,)."""
        with torch.no_grad():
            reference_features = self.features(references)
        parts = []
        for activation, reference in zip(self.features(images), reference_features, strict=True):
            magnitude = reference.abs().flatten(1).mean(1).clamp_min(1e-6)
            parts.append((activation - reference).abs().flatten(1).mean(1) / magnitude)
        return torch.stack(parts).sum(0)


def vae_features(vae: AutoencoderKL) -> Features:
    """Activations of the encoder's down blocks. Every latent checkpoint has them; they describe layout and edges."""
    encoder: Any = vae.encoder

    def features(images: Tensor) -> list[Tensor]:
        activations = [encoder.conv_in(images)]
        for block in encoder.down_blocks:
            activations.append(block(activations[-1]))
        return activations[1:]

    return features


def vgg_features(file: Path, device: torch.device) -> Features:
    """Activations of VGG16's first four blocks, as in the paper.

    ``file`` is a safetensors file of its weights with torchvision's parameter names; raises :class:`ModelNotReady` if
    it is not.
    """
    try:
        weights = load_file(file)
        blocks = nn.ModuleList(_vgg_block(weights, numbers, i > 0) for i, numbers in enumerate(_VGG_BLOCKS))
        tried = nn.Sequential(*blocks)(torch.zeros(1, 3, 16, 16))
    except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as error:
        raise ModelNotReady(
            f"vgg: '{file}' must be a safetensors file of VGG16's weights with torchvision's names; the server log has "
            "the cause"
        ) from error
    if not bool(tried.isfinite().all()):
        raise ModelNotReady(f"vgg: '{file}' gives NaN or infinite numbers: copy or convert it again")
    blocks = blocks.requires_grad_(False).eval().to(device)
    mean, std = (
        torch.tensor(v, device=device).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )

    def features(images: Tensor) -> list[Tensor]:
        x = functional.interpolate((images + 1) / 2, (224, 224), mode="bilinear", antialias=True)
        activations = [(x - mean) / std]
        for block in blocks:
            activations.append(block(activations[-1]))
        return activations[1:]

    return features


def _vgg_block(weights: dict[str, Tensor], numbers: tuple[int, ...], pooled: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if pooled else []
    for number in numbers:
        weight, bias = weights[f"features.{number}.weight"].float(), weights[f"features.{number}.bias"].float()
        convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        convolution.weight, convolution.bias = nn.Parameter(weight), nn.Parameter(bias)
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers)
