"""Draw the edits with a known answer: ``python -m benchmarks.make_composites --sprites FILE``.

``cases.json`` describes each case: a composite before and after one change. This command draws source, target and
region of every case and writes their captions into ``cases.json``, with the recipe of the embedded model.
``--recipe-dir`` is the folder with the ``recipe`` package, ``FILE`` the output of ``recipe.prepare``. Sprites that the
model was trained on are refused.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.cases import FOLDER

OPAQUE = 0.5
"""Alpha above which a pixel belongs to the sprite."""


class Recipe:
    """The drawing part of the recipe, imported at run time because the recipe is not installed."""

    def __init__(self, folder: Path, sprites: Path) -> None:
        sys.path.insert(0, str(folder))
        self._data, self._words, self._captions = (
            importlib.import_module(f"recipe.{name}") for name in ("data", "vocabulary", "captions")
        )
        self._sprites = importlib.import_module("recipe.sprites").Sprites(sprites)
        self._composer = self._data.Composer(self._sprites, torch.device("cpu"))

    def draw(self, shows: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Images (2, 3, 64, 64) and alphas (2, 1, 64, 64) in [0, 1], and captions, before and after the change."""
        scenes = self._scenes(shows, [shows["before"], shows["after"]])
        images, alphas = self._composer.render(scenes)
        captions = [self._captions.sentence(facts) for facts in self._composer.facts(scenes).tolist()]
        return (images + 1) / 2, alphas, captions

    def _scenes(self, shows: dict[str, Any], looks: list[dict[str, str]]) -> Any:
        n, backgrounds = len(looks), list(self._words.BACKGROUNDS)
        placement = (torch.tensor([shows[key]]) for key in ("scale", "shift", "flip"))
        return self._data.Scenes(
            sprite=torch.tensor([self._sprite(look) for look in looks]),
            background=torch.tensor([backgrounds.index(look["background"]) for look in looks]),
            pattern=torch.tensor([self._words.PATTERNS.index(shows["pattern"])] * n),
            phase=torch.tensor([shows["phase"]] * n),
            theta=self._data.placement(*placement).expand(n, -1, -1),
        )

    def _sprite(self, look: dict[str, str]) -> int:
        if (look["name"], look["style"]) not in self._sprites.held_out_pairs:
            raise SystemExit(f"{look['style']} {look['name']} is in the training data; choose a held-out sprite")
        columns = zip(*(getattr(self._sprites, key) for key in ("name", "style", "colour", "tone")), strict=True)
        return list(columns).index((look["name"], look["style"], look["colour"], look["tone"]))


def draw(case: dict[str, Any], recipe: Recipe, out: Path) -> dict[str, Any]:
    """Write source, target and mask of one case; returns the case with their file names and the captions."""
    images, alphas, captions = recipe.draw(case["shows"])
    region = np.asarray(alphas.amax((0, 1)) > OPAQUE)
    if case["kind"] == "background":
        region = ~region
    files = {part: f"{case['name']}-{part}.png" for part in ("source", "target", "mask")}
    for part, image in zip(("source", "target"), images, strict=True):
        pixels = image.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(out / files[part], optimize=True)
    Image.fromarray(region).save(out / files["mask"], optimize=True)
    return case | files | {"source_prompt": captions[0], "target_prompt": captions[1]}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe-dir", type=Path, default=Path("models/underpaint-mini"))
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder with cases.json, for the images too")
    args = parser.parse_args()
    recipe, listing = Recipe(args.recipe_dir, args.sprites), args.out / "cases.json"
    cases = [draw(case, recipe, args.out) for case in json.loads(listing.read_text())["cases"]]
    listing.write_text(json.dumps({"cases": cases}, indent=1) + "\n")
    print(f"{len(cases)} cases in {args.out}")


if __name__ == "__main__":
    main()
