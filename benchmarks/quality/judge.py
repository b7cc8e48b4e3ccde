"""What a CLIP sees in pictures: the measure of whether an edit says what it was asked to say."""

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
    """One CLIP, in float32 on the CPU, read as the server reads one. The same judge reads the edits of all models."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is a directory of one with its tokenizer."""
        self._clip = Clip.load(folder, device=torch.device("cpu"))
        self.digest = checkpoint.digest(folder)
        """Of its files."""

    @torch.inference_mode()
    def similarity(self, pixels: Pixels, texts: Sequence[str]) -> list[float]:
        """Cosine between a picture (height, width, 3) and each text, -1 to 1."""
        found: list[float] = (self._clip.text_embeds(texts) @ self._seen(pixels)).tolist()
        return found

    @torch.inference_mode()
    def direction(self, before: Pixels, after: Pixels, source_text: str, target_text: str) -> float:
        """Cosine between the change of a picture and the change of its caption, -1 to 1; 0 for no change at all."""
        source, target = self._clip.text_embeds((source_text, target_text))
        return float(functional.cosine_similarity(self._seen(after) - self._seen(before), target - source, dim=0))

    def _seen(self, pixels: Pixels) -> Tensor:
        return self._clip.image_embeds(tensors.image(pixels)[None])[0]
