"""The sprites in memory: recoloured, split into training and held-out pairs, and indexed for drawing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from recipe.files import needed
from recipe.vocabulary import COLOURS, HUES

HELD_OUT_SHARE = 0.04
COLUMNS = ("name", "style", "colour", "tone", "hue")
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def turn_hue(rgba: Pixels, degrees: float) -> Pixels:
    """The sprite, uint8 (h, w, 4), with every hue turned by ``degrees``."""
    hue, saturation, value = Image.fromarray(rgba[..., :3]).convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int32) + round(degrees / 360 * 255)) % 256
    channels = (Image.fromarray(turned.astype(np.uint8)), saturation, value)
    return np.concatenate([np.asarray(Image.merge("HSV", channels).convert("RGB")), rgba[..., 3:]], axis=-1)


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lists of different lengths as one table, so that one member of many lists is drawn at once."""

    table: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "Ragged":
        """``lists`` must not hold an empty one."""
        rows = [torch.tensor(row) for row in lists]
        return cls(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in lists]))

    def pick(self, rows: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """One member of each of ``rows`` (n,), chosen by ``u`` (n,) in [0, 1)."""
        return self.table[rows, (u * self.counts[rows]).long()]

    def members(self) -> torch.Tensor:
        """The members of all lists, one after another."""
        return self.table[torch.arange(self.table.shape[1]) < self.counts[:, None]]


@dataclass(frozen=True, slots=True)
class Index:
    """One side of the split: names -> (name, style) pairs -> sprites, originals first."""

    pairs: Ragged
    sprites: Ragged
    by_colour: torch.Tensor
    """(pairs, colours): the sprite of that colour, -1 where there is none."""


class Sprites:
    """All sprites, the recoloured ones included; no held-out (name, style) pair is in the training index."""

    def __init__(self, file: Path) -> None:
        data = np.load(file)
        self.name: list[str] = []
        self.style: list[str] = []
        self.colour: list[str] = []
        self.tone: list[str] = []
        pixels: list[Pixels] = []
        originals = zip(data["rgba"], *(data[key].tolist() for key in COLUMNS), strict=True)
        for rgba, name, style, colour, tone, hue in originals:
            turned = {} if np.isnan(hue) else {word: at for word, at in HUES.items() if word != colour}
            pixels += [rgba, *(turn_hue(rgba, at - hue) for at in turned.values())]
            copies = 1 + len(turned)
            self.name += [name] * copies
            self.style += [style] * copies
            self.colour += [colour, *turned]
            self.tone += [tone] * copies
        self.rgba = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        """uint8 (n, 4, 72, 72)."""
        self._pair = list(zip(self.name, self.style, strict=True))
        self.held_out_pairs = self._hold_out()

    @classmethod
    def of(cls, work: Path, name: str = "sprites") -> "Sprites":
        """Those of a work folder; ends the program if they were not prepared."""
        return cls(needed(work / f"{name}.npz", "prepare"))

    def __len__(self) -> int:
        return len(self.name)

    def index(self, held_out: bool = False, names: frozenset[str] | None = None) -> Index:
        """The training or the held-out side, of ``names`` or of all."""
        members: dict[str, dict[str, list[int]]] = {}
        for i, pair in enumerate(self._pair):
            if (pair in self.held_out_pairs) == held_out and (names is None or pair[0] in names):
                members.setdefault(pair[0], {}).setdefault(pair[1], []).append(i)
        sprites = [row for styles in members.values() for row in styles.values()]
        first = np.cumsum([0, *(len(styles) for styles in members.values())]).tolist()
        pairs = [range(first[i], first[i + 1]) for i in range(len(members))]
        return Index(Ragged.of(pairs), Ragged.of(sprites), torch.tensor([self._coloured(row) for row in sprites]))

    def _coloured(self, row: list[int]) -> list[int]:
        of = {self.colour[i]: i for i in row}
        return [of.get(colour, -1) for colour in COLOURS]

    def _hold_out(self) -> set[tuple[str, str]]:
        pairs = sorted(set(self._pair))
        rng = np.random.default_rng(7)
        return {pairs[i] for i in rng.choice(len(pairs), int(len(pairs) * HELD_OUT_SHARE), replace=False)}
