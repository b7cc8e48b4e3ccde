"""What a CLIP recognises in pictures: the measure of samples, and of the CLIP itself on real composites."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from recipe.captions import BACKGROUND, COLOUR, NOUN, PARTS, STYLE, TONE, UNSAID, Tokens, sentence

JUDGED: dict[str, int] = {"noun": NOUN, "style": STYLE, "colour": COLOUR, "background": BACKGROUND, "tone": TONE}
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Recognised:
    """How many pictures were recognised of how many that have the attribute."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.right / max(1, self.total)


def options(facts: torch.Tensor, part: int) -> torch.Tensor:
    """All captions (n, options, 6) that ask one attribute of each picture: its noun with every style, and so on."""
    n, count = len(facts), len(list(PARTS.values())[part])
    asked = torch.full((n, count, facts.shape[1]), UNSAID)
    asked[:, :, NOUN] = facts[:, None, NOUN]
    asked[:, :, part] = torch.arange(count)
    return asked


class Judge:
    """Reads pictures and captions with one CLIP."""

    def __init__(self, clip: Any, tokens: Tokens) -> None:
        self.clip, self.tokens = clip, tokens
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def captions(self, facts: torch.Tensor) -> torch.Tensor:
        """Unit vectors (n, d) of captions given as codes (n, 6)."""
        rows = [tuple(row) for row in facts.tolist()]
        new = [row for row in dict.fromkeys(rows) if row not in self._known]
        for i in range(0, len(new), CHUNK):
            ids = self.tokens([sentence(list(row)) for row in new[i : i + CHUNK]]).to(self.clip.device)
            found = self.clip.text_projection(self.clip.text_model(ids).pooler_output)
            self._known.update(zip(new[i : i + CHUNK], functional.normalize(found.float(), dim=-1), strict=True))
        return torch.stack([self._known[row] for row in rows])

    def pictures(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors (n, d) of images (n, 3, 64, 64) in [-1, 1]."""
        parts = [self.clip.vision_model(part.to(self.clip.device)).pooler_output for part in torch.split(images, CHUNK)]
        return functional.normalize(self.clip.visual_projection(torch.cat(parts)).float(), dim=-1)

    @torch.no_grad()
    def recognise(self, images: torch.Tensor, facts: torch.Tensor) -> dict[str, Recognised]:
        """For each attribute that a picture has, how often its true word makes the nearest caption among all words."""
        seen = self.pictures(images)
        shown = {name: part for name, part in JUDGED.items() if (facts[:, part] != UNSAID).any()}
        return {name: self._recognise(seen, facts, part) for name, part in shown.items()}

    def _recognise(self, seen: torch.Tensor, facts: torch.Tensor, part: int) -> Recognised:
        rows = facts[:, part] != UNSAID
        asked = options(facts[rows], part)
        texts = self.captions(asked.flatten(0, 1)).view(*asked.shape[:2], -1)
        best = torch.einsum("nd,nod->no", seen[rows.to(seen.device)], texts).argmax(1).cpu()
        return Recognised(int((best == facts[rows, part]).sum()), int(rows.sum()))

    @torch.no_grad()
    def top1(self, images: torch.Tensor, facts: torch.Tensor) -> float:
        """How often a picture's own full caption is nearest among all pictures' captions."""
        near = self.pictures(images) @ self.captions(facts).T
        return float((near.argmax(1).cpu() == torch.arange(len(images))).float().mean())
