"""Reading and changing a U-Net's inner activations, row by row."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from underpaint_server.rows import Captured, Denoise


class Taps:
    """Hooks on the blocks of a network of diffusers, registered once. They act on the rows of :meth:`answers` alone.

    A row's capture and maps see that row's activation and no other, so they fit into any batch. Where no row wants
    anything of a site, its activation passes untouched.
    """

    def __init__(self, unet: Any) -> None:
        blocks: dict[str, Any] = {"mid": unet.mid_block}
        blocks |= {f"up_{i}": block for i, block in enumerate(unet.up_blocks)}
        self.sites = tuple(site for site, block in blocks.items() if block is not None)
        """Names of the blocks, in the order they run."""
        self._rows: list[Denoise] = []
        self._captured: list[dict[str, Tensor]] = []
        for site, block in blocks.items():
            if block is not None:
                block.register_forward_hook(partial(self._hook, site))

    def answers(
        self, noise_preds: Callable[[list[Denoise]], Iterable[Tensor]], rows: list[Denoise]
    ) -> list[Tensor | Captured]:
        """Answers of ``rows`` from one pass, in their order."""
        self._rows, self._captured = rows, [{} for _ in rows]
        try:
            answers = zip(rows, noise_preds(rows), self._captured, strict=True)
            return [Captured(pred, features) if row.capture else pred for row, pred, features in answers]
        finally:
            self._rows, self._captured = [], []

    def _hook(self, site: str, block: Any, inputs: Any, output: Any) -> Any:
        del block, inputs
        if not any(site in row.capture or site in row.maps for row in self._rows):
            return None
        hidden: Tensor = output[0] if isinstance(output, tuple) else output  # blocks with skips of their own give two
        changed = hidden.clone()
        for i, row in enumerate(self._rows):
            if site in row.capture or site in row.maps:
                own = _alone(hidden[i])
                if site in row.capture:
                    self._captured[i][site] = own
                if site in row.maps:
                    changed[i] = row.maps[site](own).to(hidden.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _alone(activation: Tensor) -> Tensor:
    """One row's activation with memory of its own: sums over it must not depend on how the batch lies in memory."""
    return activation.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
