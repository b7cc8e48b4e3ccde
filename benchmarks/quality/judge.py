"""What a CLIP sees in pictures: the measure of whether an edit says what it was asked to say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, CLIPTokenizer
from underpaint_server.models import checkpoint


class Judge:
    """One CLIP, in float32 on the CPU. The same judge reads the edits of all models."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is a directory of one with its tokenizer."""
        self._clip: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer: Any = CLIPTokenizer.from_pretrained(folder)
        self._px = int(self._clip.config.vision_config.image_size)
        self.digest = checkpoint.digest(folder)
        """Of its files."""
        self._texts: dict[str, Tensor] = {}

    @torch.inference_mode()
    def similarity(self, pixels: NDArray[np.uint8], texts: Sequence[str]) -> list[float]:
        """Cosine between a picture (height, width, 3) and each text, -1 to 1."""
        seen = self._seen(pixels)
        return [float(functional.cosine_similarity(seen, self._text(text), dim=0)) for text in texts]

    @torch.inference_mode()
    def direction(
        self, before: NDArray[np.uint8], after: NDArray[np.uint8], source_text: str, target_text: str
    ) -> float:
        """Cosine between the change of a picture and the change of its caption, -1 to 1; 0 for no change at all."""
        seen = functional.normalize(self._seen(after), dim=0) - functional.normalize(self._seen(before), dim=0)
        texts = (functional.normalize(self._text(text), dim=0) for text in (target_text, source_text))
        return float(functional.cosine_similarity(seen, next(texts) - next(texts), dim=0))

    def _seen(self, pixels: NDArray[np.uint8]) -> Tensor:
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        if image.shape[2:] != (self._px, self._px):
            image = functional.interpolate(image, (self._px, self._px), mode="bilinear", antialias=True)
        seen: Tensor = self._clip.visual_projection(self._clip.vision_model(image).pooler_output)[0]
        return seen

    def _text(self, text: str) -> Tensor:
        if text not in self._texts:
            ids = self._tokenizer([text], return_tensors="pt", truncation=True)["input_ids"]
            self._texts[text] = self._clip.text_projection(self._clip.text_model(ids).pooler_output)[0]
        return self._texts[text]
