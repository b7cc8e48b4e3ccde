"""CLIP (Radford et al., ICML 2021): embeddings of images and texts in one space, for the loss of learned directions.

Image embeddings are differentiable with respect to the image. OpenAI's CLIP is a ``CLIPModel`` of transformers; the
embedded model's has a convolutional vision tower and is a ``VisionTextDualEncoderModel``. Both have the four parts of
``_PARTS``, and only these are used.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, CLIPTokenizer

from underpaint_server.errors import ModelNotReady
from underpaint_server.models import checkpoint

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation (RGB, pixels in [0, 1]) that OpenAI's CLIP was trained with. The values of a
preprocessor_config.json are used instead where it has them."""
_PARTS = ("vision_model", "visual_projection", "text_model", "text_projection")


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """One CLIP model, float32: vision tower, text tower and preprocessing."""

    model: Any
    """``CLIPModel`` or ``VisionTextDualEncoderModel``."""
    tokenizer: CLIPTokenizer
    mean: Tensor
    """(1, 3, 1, 1), float32: subtracted from pixels in [0, 1]."""
    std: Tensor
    """(1, 3, 1, 1), float32: divides the difference."""

    @classmethod
    def load(cls, directory: Path, *, device: torch.device) -> "Clip":
        """Load a transformers directory of either class; raises :class:`ModelNotReady` if that fails."""
        try:
            options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True, "use_safetensors": True}
            model, loading_info = AutoModel.from_pretrained(directory, dtype=torch.float32, **options)
            tokenizer = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
            file = directory / "preprocessor_config.json"
            config = json.loads(file.read_text()) if file.exists() else {}
            mean, std = (
                torch.tensor(config.get(key, default), device=device).view(1, 3, 1, 1)
                for key, default in (("image_mean", _MEAN), ("image_std", _STD))
            )
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise ModelNotReady(f"'{directory}' cannot be read as a CLIP; the server log has the cause") from error
        if not all(hasattr(model, part) for part in _PARTS):
            raise ModelNotReady(
                f"'{directory}' holds a {type(model).__name__}, which is not a CLIP model: give a CLIPModel or "
                "VisionTextDualEncoderModel"
            )
        checkpoint.check_complete(directory, loading_info)
        clip = cls(model.requires_grad_(False).eval().to(device), tokenizer, mean, std)
        _try(clip, directory)
        return clip

    def image_embeds(self, images: Tensor) -> Tensor:
        """Unit vectors (b, d) of images (b, 3, H, W) in [-1, 1]; differentiable. Images are resized to CLIP's size."""
        size = int(self.model.config.vision_config.image_size)
        if images.shape[-2:] != (size, size):
            images = functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
        pooled = self.model.vision_model((((images + 1) / 2) - self.mean) / self.std).pooler_output
        return functional.normalize(self.model.visual_projection(pooled), dim=-1)

    def text_embeds(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (b, d) of texts; a text is truncated to the length of the text tower's context."""
        return torch.stack([_text_embed(self, text) for text in texts])


def _try(clip: Clip, directory: Path) -> None:
    """Embed a text and an image; raises :class:`ModelNotReady` if that fails."""
    largest, tokens = max(clip.tokenizer.get_vocab().values()), int(clip.model.config.text_config.vocab_size)
    if largest >= tokens:
        raise ModelNotReady(
            f"'{directory}': the tokenizer has {largest + 1} tokens, but the CLIP only {tokens} (vocab_size): give the "
            "tokenizer that belongs to it"
        )
    try:
        with torch.no_grad():
            image = torch.zeros(1, 3, 8, 8, device=clip.mean.device)
            embeds = torch.cat([clip.text_embeds(["a red apple"]), clip.image_embeds(image)])
    except torch.AcceleratorError:
        raise
    except Exception as error:  # what a library raises for parts that do not belong together is of any class
        raise ModelNotReady(f"'{directory}' cannot embed a text and an image; the server log has the cause") from error
    if not bool(embeds.isfinite().all()):
        raise ModelNotReady(f"'{directory}': the CLIP returns NaN or infinite numbers: copy or convert it again")


@lru_cache(maxsize=1024)
def _text_embed(clip: Clip, text: str) -> Tensor:
    length = int(clip.model.config.text_config.max_position_embeddings)
    tokens = clip.tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        pooled = clip.model.text_model(tokens["input_ids"].to(clip.mean.device)).pooler_output
        return functional.normalize(clip.model.text_projection(pooled), dim=-1)[0]
