"""The judge: a CLIP that measures how well an image matches a caption."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from underpaint_server.models import checkpoint, tensors
from underpaint_server.models.clip import Clip

Pixels = NDArray[np.uint8]


class Judge:
    """A CLIP in float32 on the CPU, loaded with the server's code; the same one judges the edits of all models."""

    def __init__(self, folder: Path) -> None:
        """Load the CLIP and its tokenizer from ``folder``."""
        self._clip = Clip.load(folder, device=torch.device("cpu"))
        self.digest = checkpoint.digest(folder)
        """Digest of the CLIP's files."""

    @torch.inference_mode()
    def similarity(self, pixels: Pixels, texts: Sequence[str]) -> list[float]:
        """Cosine similarity of an image (height, width, 3) and each text, [-1, 1]."""
        cosines: list[float] = (self._clip.text_embeds(texts) @ self._image_embeds(pixels)).tolist()
        return cosines

    @torch.inference_mode()
    def direction(self, before: Pixels, after: Pixels, source_text: str, target_text: str) -> float:
        """Directional similarity: cosine of the image's change and the caption's change, [-1, 1]; 0 for no change."""
        source, target = self._clip.text_embeds((source_text, target_text))
        change = self._image_embeds(after) - self._image_embeds(before)
        return float(functional.cosine_similarity(change, target - source, dim=0))

    def _image_embeds(self, pixels: Pixels) -> Tensor:
        return self._clip.image_embeds(tensors.image(pixels)[None])[0]
