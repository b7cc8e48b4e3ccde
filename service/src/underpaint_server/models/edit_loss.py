"""The loss of learned directions: did the picture change as the texts do, and is it otherwise the same?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from underpaint_server.errors import ModelNotReady
from underpaint_server.models.clip import Clip
from underpaint_server.models.libraries import AutoencoderKL
from underpaint_server.rows import Score, Scored

FAINT = 1e-2
"""Changes of a picture much shorter than this have no direction yet. Without it the derivative at no change at all
would be infinite, and one such step would spoil Adam's running means for the rest."""

Features = Callable[[Tensor], list[Tensor]]
"""Images (b, 3, H, W) in [-1, 1] to activations (b, ...), shallow to deep."""

_VGG_BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21))
"""Numbers of VGG16's convolutions in torchvision's ``features``, by block; blocks are joined by pooling."""


@dataclass(frozen=True, slots=True, eq=False)
class EditLoss:
    """Directional CLIP loss (Gal et al., 2022) and content loss (Wu et al., CVPR 2023, eq. 7)."""

    name: str
    """Whose features the content loss compares: "vae" or "vgg16"."""
    clip: Clip
    features: Features

    def scores(self, rows: Sequence[Score]) -> list[Scored]:
        """The answers of rows of one size, from one pass; gradients are of each row's own loss."""
        images = torch.stack([row.image for row in rows]).requires_grad_(rows[0].gradient)
        references = torch.stack([row.reference for row in rows])
        directional = self._directional(images, references, rows)
        content = self._content(images, references)
        weights = torch.tensor([row.content_weight for row in rows], device=images.device)
        gradients: Sequence[Tensor | None] = [None] * len(rows)
        if rows[0].gradient:
            (by_images,) = torch.autograd.grad((directional + weights * content).sum(), images)
            gradients = by_images.unbind()
        found = zip(directional.tolist(), content.tolist(), gradients, strict=True)
        return [Scored(one, other, gradient) for one, other, gradient in found]

    def _directional(self, images: Tensor, references: Tensor, rows: Sequence[Score]) -> Tensor:
        """(b,): 1 - cosine of the two changes."""
        with torch.no_grad():
            before = self.clip.image_embeds(references)
        said = self.clip.text_embeds([row.target_text for row in rows]) - self.clip.text_embeds(
            [row.source_text for row in rows]
        )
        seen = self.clip.image_embeds(images) - before
        length = (seen.square().sum(1) + FAINT**2).sqrt()
        return 1 - (seen * functional.normalize(said, dim=1)).sum(1) / length

    def _content(self, images: Tensor, references: Tensor) -> Tensor:
        """(b,): mean absolute difference of each layer's activations in units of their own size, summed over layers."""
        with torch.no_grad():
            wanted = self.features(references)
        parts = []
        for found, reference in zip(self.features(images), wanted, strict=True):
            size = reference.abs().flatten(1).mean(1).clamp_min(1e-6)
            parts.append((found - reference).abs().flatten(1).mean(1) / size)
        return torch.stack(parts).sum(0)


def vae_features(vae: AutoencoderKL) -> Features:
    """Activations of the autoencoder's down blocks: every latent checkpoint has them, and they see layout and edges."""
    encoder: Any = vae.encoder

    def features(images: Tensor) -> list[Tensor]:
        activations = [encoder.conv_in(images)]
        for block in encoder.down_blocks:
            activations.append(block(activations[-1]))
        return activations[1:]

    return features


def vgg_features(file: Path, device: torch.device) -> Features:
    """Activations of VGG16's first four blocks, as in the paper; ``file`` holds torchvision's weights as safetensors.

    Raises :class:`ModelNotReady`.
    """
    try:
        weights = load_file(file)
        blocks = nn.ModuleList(_vgg_block(weights, numbers, i > 0) for i, numbers in enumerate(_VGG_BLOCKS))
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelNotReady(f"'{file}' does not hold VGG16's weights under torchvision's names: {error}") from error
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
