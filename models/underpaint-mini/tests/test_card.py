"""What the card and the figures say of the weights that ship."""

from pathlib import Path

import torch
import underpaint_mini
from recipe.export import LIMIT_BYTES
from underpaint_server.models import families

FOLDER = Path(__file__).parents[1]
QUALITY = FOLDER.parents[1] / "benchmarks" / "quality.md"


def digest(place: Path) -> str:
    """As a server says it."""
    return families.load(place, dtype=torch.float32, device=torch.device("cpu")).digest


def test_the_card_names_the_digest_of_the_model_that_ships() -> None:
    """So that whoever reads a digest in a server's answer finds the card of it."""
    assert f"`{digest(underpaint_mini.MODEL)}`" in (FOLDER / "README.md").read_text()


def test_the_quality_figures_are_of_the_models_that_ship() -> None:
    """New weights need `make quality` anew."""
    report = QUALITY.read_text()
    for place in (underpaint_mini.MODEL, underpaint_mini.DDPM):
        assert f"(weights {digest(place)[:12]})" in report


def test_all_weights_together_are_within_the_limit() -> None:
    """What ships, not what an export would be."""
    weights = list(Path(underpaint_mini.MODEL).parent.rglob("*.safetensors"))
    assert 0 < sum(file.stat().st_size for file in weights) < LIMIT_BYTES
