"""Edits with a known answer: composites with their true target image and their true region."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FOLDER = Path(__file__).parents[1] / "tests" / "data" / "composites"
KINDS = ("colour", "object", "background", "style", "skin tone")
"""The kinds of edit: what differs between source and target."""


@dataclass(frozen=True, slots=True)
class Case:
    """One photo, the edit to be made, and the image that a perfect edit would give."""

    name: str
    kind: str
    """One of :data:`KINDS`."""
    photo: Path
    target: NDArray[np.uint8]
    """(64, 64, 3)."""
    region: NDArray[np.bool_]
    """(64, 64), True where the edit may change the photo."""
    source_prompt: str
    target_prompt: str

    @property
    def source(self) -> NDArray[np.uint8]:
        """The photo's pixels, (64, 64, 3)."""
        return pixels(Image.open(self.photo))


def load(per_kind: int | None = None) -> list[Case]:
    """All cases, by kind; at most ``per_kind`` of each kind where given."""
    listing: list[dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())["cases"]
    by_kind = {kind: [entry for entry in listing if entry["kind"] == kind][:per_kind] for kind in KINDS}
    return [_case(entry) for entries in by_kind.values() for entry in entries]


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    """The RGB pixels of an image, (height, width, 3)."""
    return np.asarray(image.convert("RGB"))


def psnr_db(one: NDArray[np.uint8], other: NDArray[np.uint8], region: NDArray[np.bool_] | None = None) -> float:
    """Peak signal-to-noise ratio of two images in dB, over all pixels or over ``region`` (height, width)."""
    squared = np.square(one.astype(np.float64) - other)
    return float(10 * np.log10(255**2 / (squared if region is None else squared[region]).mean()))


def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Intersection over union of two regions, which must not both be empty."""
    return float((one & other).sum() / (one | other).sum())


def coarse(region: NDArray[np.bool_], cell: int = 4) -> NDArray[np.bool_]:
    """The region at the latents' resolution: each cell of ``cell`` x ``cell`` pixels takes its majority's value."""
    height, width = region.shape
    majority = region.reshape(height // cell, cell, width // cell, cell).mean((1, 3)) >= 0.5
    return np.repeat(np.repeat(majority, cell, 0), cell, 1)


def _case(entry: dict[str, Any]) -> Case:
    return Case(
        name=entry["name"],
        kind=entry["kind"],
        photo=FOLDER / entry["source"],
        target=pixels(Image.open(FOLDER / entry["target"])),
        region=np.asarray(Image.open(FOLDER / entry["mask"]).convert("L")) >= 128,
        source_prompt=entry["source_prompt"],
        target_prompt=entry["target_prompt"],
    )
