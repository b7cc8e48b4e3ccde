"""The recipe is not installed: its tests find it beside them, and draw on a handful of sprites made here."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from recipe.captions import Tokens, train_tokenizer
from recipe.data import Composer
from recipe.prepare import sprites_of, unnamed, unstyled, write
from recipe.sprites import Sprites
from recipe.train_clip import More
from recipe.vocabulary import PLAIN_NAMES, STYLES

TONES = ("", "-light-skin-tone", "-dark-skin-tone")
SHAPES = ('<circle cx="8" cy="8" r="7"', '<rect x="2" y="4" width="12" height="8"', '<path d="M8 1 15 15H1Z"')
NAMES = ["red-apple", "black-heart", *PLAIN_NAMES[:8]]


def icons(style: int) -> dict[str, object]:
    """A small icon set in the form of the real ones: coloured and grey shapes, an alias, a hand with two tones."""
    colours = ["#d02020", "#20a040", "#777"]
    drawn = {n: f'{SHAPES[(i + style) % 3]} fill="{colours[i % 3]}"/>' for i, n in enumerate(NAMES)}
    drawn |= dict.fromkeys(("compass", "flag-spain", "boy-light"), f'{SHAPES[style % 3]} fill="currentColor"/>')
    drawn |= {f"thumbs-up{tone}": f'{SHAPES[style % 3]} fill="#fc0"/>' for tone in TONES}
    bodies = {name: {"body": body} for name, body in drawn.items()}
    return {"icons": bodies, "aliases": {"camel": {"parent": "bat"}}, "width": 16, "height": 16}


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with sprites and tokenizer."""
    folder = tmp_path_factory.mktemp("work")
    made = [sprite for i, style in enumerate(STYLES) for sprite in sprites_of(icons(i), style)]
    write(made, folder / "sprites.npz")
    other = [sprite for i, style in enumerate(STYLES) for sprite in unnamed(icons(i), style)]
    write([*other, *unstyled(icons(7))], folder / "more.npz")
    train_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def sprites(work: Path) -> Sprites:
    """The sprites as training loads them."""
    return Sprites(work / "sprites.npz")


@pytest.fixture(scope="session")
def composer(sprites: Sprites) -> Composer:
    """Draws scenes on the CPU."""
    return Composer(sprites, torch.device("cpu"))


@pytest.fixture(scope="session")
def more(work: Path) -> More:
    """What the CLIP sees beside them."""
    return More.of(Sprites(work / "more.npz"), torch.device("cpu"))


@pytest.fixture(scope="session")
def tokens(work: Path) -> Tokens:
    """The tokenizer with its cache of words."""
    return Tokens(work / "tokenizer")
