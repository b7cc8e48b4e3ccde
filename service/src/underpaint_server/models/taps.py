"""Capture and change the activations of a U-Net's feature sites, separately for each row of a pass."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from underpaint_server.rows import Captured, Denoise

Handler = Callable[[str, Tensor], Tensor | None]
"""Function of a feature site and the batch's activation there (b, c, h, w). It returns the activation that the rest of
the network is to run with, or None for the same."""


def blocks(unet: Any) -> dict[str, nn.Module]:
    """Feature site -> the block of a diffusers U-Net whose output it is, in the order in which they run."""
    named = {"mid": unet.mid_block, **{f"up_{i}": block for i, block in enumerate(unet.up_blocks)}}
    return {site: block for site, block in named.items() if block is not None}


class Taps:
    """Forward hooks on the middle and up blocks of a diffusers U-Net.

    Captures and maps of a row see the activation of that row only, so rows with different ones can share a pass. The
    activation of a site that no row captures or maps is left unchanged.
    """

    def __init__(self, unet: Any) -> None:
        sites = blocks(unet)
        self.sites = tuple(sites)
        """Names of the feature sites, in the order in which their blocks run; see :class:`Denoise`."""
        self._rows: list[Denoise] = []
        self._captured: list[dict[str, Tensor]] = []
        self._handler: Handler = self.change
        for site, block in sites.items():
            block.register_forward_hook(partial(self._hook, site))

    def answers(
        self, noise_preds: Callable[[list[Denoise]], Iterable[Tensor]], rows: list[Denoise]
    ) -> list[Tensor | Captured]:
        """Results of ``rows``, in their order; ``noise_preds`` evaluates the U-Net on them in one pass."""
        self._rows, self._captured = rows, [{} for _ in rows]
        try:
            results = zip(rows, noise_preds(rows), self._captured, strict=True)
            return [Captured(pred, features) if row.capture else pred for row, pred, features in results]
        finally:
            self._rows, self._captured = [], []

    @property
    def wanted(self) -> tuple[str, ...]:
        """The sites that the rows of the current call of :meth:`answers` capture or map."""
        return tuple(site for site in self.sites if any(site in row.capture or site in row.maps for row in self._rows))

    def change(self, site: str, activation: Tensor) -> Tensor | None:
        """A copy of the batch's activation, changed by the rows' maps; it is captured before. None where no row of the
        current call of :meth:`answers` captures or maps it."""
        if not any(site in row.capture or site in row.maps for row in self._rows):
            return None
        changed = activation.clone()
        for i, row in enumerate(self._rows):
            if site in row.capture or site in row.maps:
                own = _copied(activation[i])
                if site in row.capture:
                    self._captured[i][site] = own
                if site in row.maps:
                    changed[i] = row.maps[site](own).to(activation.dtype)
        return changed

    @contextmanager
    def handled_by(self, handler: Handler) -> Iterator[None]:
        """Have ``handler`` called at every site in place of :meth:`change`, until the block is left."""
        self._handler = handler
        try:
            yield
        finally:
            self._handler = self.change

    def _hook(self, site: str, block: Any, inputs: Any, output: Any) -> Any:
        del block, inputs
        hidden: Tensor = output[0] if isinstance(output, tuple) else output  # blocks with a skip sample return a pair
        changed = self._handler(site, hidden)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _copied(activation: Tensor) -> Tensor:
    """A contiguous float32 copy, so that the bits of sums over it do not depend on the memory layout of the batch."""
    return activation.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
