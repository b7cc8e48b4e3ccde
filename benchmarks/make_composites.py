"""Make the edits with a known answer: ``python -m benchmarks.make_composites --recipe-dir DIR --sprites FILE --out DIR``.

``DIR`` holds the embedded model's ``recipe`` package, ``FILE`` is what its ``recipe.prepare`` wrote. Every case is one
composite before and after a change of one thing, with the region that may change. Sources and targets show only
(name, style) pairs that the model never saw in training. The same seed makes the same files.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SEED = 20
PER_KIND = 6
OPAQUE = 0.5
"""Alpha above which a pixel belongs to the sprite."""
TONES = (
    ("light", "dark"), ("dark", "light"), ("medium light", "medium dark"),
    ("medium dark", "light"), ("medium", "dark"), ("light", "medium dark"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """One case before it is drawn: two scenes that differ in one thing."""

    kind: str
    source: Any
    target: Any


@dataclass(frozen=True, slots=True)
class Entry:
    """One case as ``cases.json`` lists it; pictures by file name."""

    name: str
    kind: str
    source: str
    target: str
    mask: str
    source_prompt: str
    target_prompt: str
    sprites: tuple[str, ...]
    """style/name of every sprite shown."""


class Chooser:
    """Draws scenes that differ in one thing; no sprite stands on a background of its own colour."""

    def __init__(self, composer: Any, backgrounds: list[str]) -> None:
        self._composer = composer
        self._backgrounds = backgrounds
        self._rng = np.random.default_rng(SEED)
        self._by_pair: dict[tuple[str, str], list[int]] = {}
        for name, styles in composer.index[True].items():
            self._by_pair |= {(name, style): members for style, members in styles.items()}

    def changes(self) -> Iterator[Change]:
        """Six of every kind."""
        for kind in ("colour", "object", "background", "style", "skin tone"):
            yield from getattr(self, f"_{kind.replace(' ', '_')}")()

    def _colour(self) -> Iterator[Change]:
        for pair in self._shuffled(self._coloured())[:PER_KIND]:
            own = self._by_pair[pair][0]
            yield self._swap("colour", own, self._one([i for i in self._by_pair[pair] if i != own]))

    def _object(self) -> Iterator[Change]:
        pairs, made = self._shuffled(self._coloured()), 0
        while made < PER_KIND:
            first = pairs.pop()
            second = next((pair for pair in pairs if pair[1] == first[1] and pair[0] != first[0]), None)
            if second is not None:
                pairs.remove(second)
                made += 1
                own = self._by_pair[first][0]
                yield self._swap("object", own, self._coloured_as(own, second))

    def _background(self) -> Iterator[Change]:
        for pair in self._shuffled(list(self._by_pair))[:PER_KIND]:
            scene = self._scene(self._by_pair[pair][0])
            others = [word for word in self._free(scene.sprite) if word != scene.background]
            yield Change("background", scene, replace(scene, background=self._one(others)))

    def _style(self) -> Iterator[Change]:
        names = {name for name, _ in self._by_pair}
        both = [[pair for pair in self._by_pair if pair[0] == name] for name in sorted(names)]
        turns = [(a, b) for pairs in both for a in pairs for b in pairs if a != b]
        for first, second in self._shuffled(turns)[:PER_KIND]:
            own = self._by_pair[first][0]
            yield self._swap("style", own, self._coloured_as(own, second))

    def _skin_tone(self) -> Iterator[Change]:
        toned = sorted(pair for pair, members in self._by_pair.items() if self._composer.tone[members[-1]])
        for k, (before, after) in enumerate(TONES):
            by_tone = {self._composer.tone[i]: i for i in self._by_pair[toned[k % len(toned)]]}
            yield self._swap("skin tone", by_tone[before], by_tone[after])

    def _swap(self, kind: str, first: int, second: int) -> Change:
        scene = self._scene(first, second)
        return Change(kind, scene, replace(scene, sprite=second))

    def _scene(self, *sprites: int) -> Any:
        scene = replace(self._composer.draw(self._rng, held_out=True), sprite=sprites[0])
        return replace(scene, background=self._one(self._free(*sprites)))

    def _free(self, *sprites: int) -> list[str]:
        taken = {self._composer.colour[i] for i in sprites}
        return [word for word in self._backgrounds if word not in taken]

    def _coloured(self) -> list[tuple[str, str]]:
        return [pair for pair, members in self._by_pair.items() if self._composer.colour[members[-1]]]

    def _coloured_as(self, sprite: int, pair: tuple[str, str]) -> int:
        members, wanted = self._by_pair[pair], self._composer.colour[sprite]
        return next((i for i in members if self._composer.colour[i] == wanted), members[0])

    def _one(self, choices: list[Any]) -> Any:
        return choices[int(self._rng.integers(len(choices)))]

    def _shuffled(self, items: list[Any]) -> list[Any]:
        return [items[i] for i in self._rng.permutation(len(items))]


def draw(change: Change, name: str, composer: Any, out: Path) -> Entry:
    """Write the three pictures of one case."""
    scenes = [change.source, change.target]
    images, alphas = composer.render(scenes)
    region = np.asarray(alphas.amax((0, 1)) > OPAQUE)
    if change.kind == "background":
        region = ~region
    files = {part: f"{name}-{part}.png" for part in ("source", "target", "mask")}
    for part, image in zip(("source", "target"), images, strict=True):
        pixels = image.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(out / files[part], optimize=True)
    Image.fromarray(region).save(out / files["mask"], optimize=True)
    sprites = tuple(dict.fromkeys(f"{composer.style[s.sprite]}/{composer.name[s.sprite]}" for s in scenes))
    captions = [composer.caption(scene) for scene in scenes]
    return Entry(name, change.kind, **files, source_prompt=captions[0], target_prompt=captions[1], sprites=sprites)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe-dir", type=Path, default=Path("models/underpaint-mini"))
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("tests/data/composites"))
    args = parser.parse_args()
    sys.path.insert(0, str(args.recipe_dir))
    data, words = importlib.import_module("recipe.data"), importlib.import_module("recipe.vocabulary")
    composer = data.Composer(args.sprites)
    args.out.mkdir(parents=True, exist_ok=True)
    entries: list[Entry] = []
    for number, change in enumerate(Chooser(composer, list(words.BACKGROUNDS)).changes()):
        name = f"{change.kind.replace(' ', '-')}-{number % PER_KIND + 1}"
        entries.append(draw(change, name, composer, args.out))
    listing = {"seed": SEED, "cases": [asdict(entry) for entry in entries]}
    (args.out / "cases.json").write_text(json.dumps(listing, indent=1) + "\n")
    print(f"{len(entries)} cases in {args.out}")


if __name__ == "__main__":
    main()
