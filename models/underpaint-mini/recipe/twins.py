"""Pairs of composites that differ in one thing that a caption says, as the source and the target of an edit do."""

from collections import defaultdict
from dataclasses import replace

import torch

from recipe.captions import BACKGROUND, COLOUR, NOUN, STYLE, TONE
from recipe.data import Composer, Scenes, joined
from recipe.sprites import Ragged
from recipe.vocabulary import BACKGROUNDS

OF_SPRITES = (STYLE, COLOUR, NOUN, TONE)
"""What a sprite decides; a background is changed without one."""


class Families:
    """Sprites that are alike but for one part of what is said of them, each with another word for it."""

    def __init__(self, sprites: torch.Tensor, facts: torch.Tensor, part: int) -> None:
        families: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
        for sprite, row in zip(sprites.tolist(), facts.tolist(), strict=True):
            if row[part] >= 0:
                families[tuple(row[:part] + row[part + 1 :])].setdefault(row[part], sprite)
        self._members = Ragged.of([list(family.values()) for family in families.values() if len(family) > 1])

    def draw(self, n: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Two members (n,) and (n,) of one family each, never the same; every sprite is drawn as often."""
        counts = self._members.counts
        rows = torch.multinomial(counts.float(), n, replacement=True, generator=rng)
        u = torch.rand(2, n, generator=rng)
        first = (u[0] * counts[rows]).long()
        second = (first + 1 + (u[1] * (counts[rows] - 1)).long()) % counts[rows]
        return self._members.table[rows, first], self._members.table[rows, second]


class Twins:
    """Draws pairs of training scenes: one place, one background, and another word for one part.

    Each is warped by itself when it is rendered for training, so that a change is no matter of equal pixels.
    """

    def __init__(self, composer: Composer) -> None:
        self.composer = composer
        self._sprites = composer.training.sprites.members()
        facts = composer.sprite_facts[self._sprites]
        self._families = {part: Families(self._sprites, facts, part) for part in OF_SPRITES}

    def draw(self, n: int, rng: torch.Generator) -> tuple[Scenes, torch.Tensor]:
        """``2 n`` scenes, the ``n`` sources first, and the part (n,) in which each differs from its target.

        Every kind of change comes equally often; ``n`` is a multiple of their number, five.
        """
        each = n // (len(OF_SPRITES) + 1)
        scenes = self.composer.draw(n, rng)
        drawn = [family.draw(each, rng) for family in self._families.values()]
        source = torch.cat([*(pair[0] for pair in drawn), scenes.sprite[:each]])
        target = torch.cat([*(pair[1] for pair in drawn), scenes.sprite[:each]])
        part = torch.tensor([*self._families, BACKGROUND]).repeat_interleave(each)
        shift = 1 + (torch.rand(n, generator=rng) * (len(BACKGROUNDS) - 1)).long()
        behind = torch.where(part == BACKGROUND, scenes.background + shift, scenes.background) % len(BACKGROUNDS)
        return joined(replace(scenes, sprite=source), replace(scenes, sprite=target, background=behind)), part
