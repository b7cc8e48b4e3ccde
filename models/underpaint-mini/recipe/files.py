"""Files of a work folder: what one stage leaves for the next."""

from pathlib import Path
from typing import Any

import torch


def needed(path: Path, stage: str) -> Path:
    """``path``, which ``recipe.STAGE`` writes; ends the program if it is missing."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: run python -m recipe.{stage} first")
    return path


def write_whole(state: Any, file: Path) -> None:
    """``torch.save`` that leaves ``file`` as it was if it is interrupted."""
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)
