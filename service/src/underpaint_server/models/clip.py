"""A CLIP beside a checkpoint: how alike pictures and texts are, differentiable by the picture.

OpenAI's and its kin are transformers' ``CLIPModel``; the embedded model's has a convolutional vision tower, and that is
a ``VisionTextDualEncoderModel``. Both have the same four parts, and nothing here asks which it is.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from underpaint_server.errors import ModelNotReady
from underpaint_server.models.libraries import AutoModel, CLIPTokenizer

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's own training pictures; a preprocessor_config.json may say otherwise."""
_PARTS = ("vision_model", "visual_projection", "text_model", "text_projection")


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """Both towers of one CLIP, in float32, with its preprocessing."""

    model: Any
    """``CLIPModel`` or ``VisionTextDualEncoderModel``."""
    tokenizer: CLIPTokenizer
    mean: Tensor
    """(1, 3, 1, 1), of pixels in [0, 1]."""
    std: Tensor
    """(1, 3, 1, 1)."""

    @classmethod
    def load(cls, directory: Path, *, device: torch.device) -> "Clip":
        """Read a transformers directory of either kind; raises :class:`ModelNotReady`."""
        try:
            model: Any = AutoModel.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
            tokenizer = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
            file = directory / "preprocessor_config.json"
            config = json.loads(file.read_text()) if file.exists() else {}
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelNotReady(f"'{directory}' cannot be read as a CLIP: {error}") from error
        if not all(hasattr(model, part) for part in _PARTS):
            raise ModelNotReady(f"'{directory}' holds a {type(model).__name__}, which is no CLIP")
        model = model.requires_grad_(False).eval().to(device)
        mean, std = (
            torch.tensor(config.get(key, default), device=device).view(1, 3, 1, 1)
            for key, default in (("image_mean", _MEAN), ("image_std", _STD))
        )
        return cls(model, tokenizer, mean, std)

    def image_embeds(self, images: Tensor) -> Tensor:
        """Unit vectors (b, d) of images (b, 3, H, W) in [-1, 1]; differentiable."""
        size = int(self.model.config.vision_config.image_size)
        if images.shape[-2:] != (size, size):
            images = functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
        seen = self.model.vision_model((((images + 1) / 2) - self.mean) / self.std).pooler_output
        return functional.normalize(self.model.visual_projection(seen), dim=-1)

    def text_embeds(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (b, d) of texts; what the context does not hold is cut."""
        return torch.stack([_text_embed(self, text) for text in texts])


@lru_cache(maxsize=1024)
def _text_embed(clip: Clip, text: str) -> Tensor:
    length = int(clip.model.config.text_config.max_position_embeddings)
    tokens = clip.tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        read = clip.model.text_model(tokens["input_ids"].to(clip.mean.device)).pooler_output
        return functional.normalize(clip.model.text_projection(read), dim=-1)[0]
