"""Whitened text states, in which a U-Net learns rare words as fast as common ones."""

import torch
from torch import nn

FLOOR = 0.01
"""Added to each direction's mean square: weaker ones are noise. A state has a mean square of 1."""
READERS = ("attn2.to_k", "attn2.to_v")


class Whitening:
    """A change of coordinates of the text states that a U-Net's cross-attentions read.

    A contrastive text tower spends most of its states' energy on few directions, and what tells nouns apart lies in
    weak ones, where the gradient of the weights that read them is small. Whitened states and weights times the inverse
    are the same function with a gradient that is not (preconditioning by the inputs' second moments: Martens and
    Grosse, ICML 2015).
    """

    def __init__(self, states: torch.Tensor) -> None:
        """``states`` (n, channels) are text states as they come."""
        wide = states.double()
        squares, directions = torch.linalg.eigh(wide.T @ wide / len(wide))
        scale = (squares + FLOOR).sqrt()
        self._white = ((directions / scale) @ directions.T).float()
        self._back = ((directions * scale) @ directions.T).float()

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """States (..., channels), whitened."""
        return states @ self._white.to(states.device)

    def enter(self, unet: nn.Module) -> None:
        """Let ``unet`` read whitened states and compute what it did."""
        _multiply(unet, self._back)

    def leave(self, unet: nn.Module) -> None:
        """Let ``unet`` read plain states again."""
        _multiply(unet, self._white)


@torch.no_grad()
def _multiply(unet: nn.Module, matrix: torch.Tensor) -> None:
    for name, module in unet.named_modules():
        if name.endswith(READERS) and isinstance(module, nn.Linear):
            module.weight.copy_(module.weight @ matrix.to(module.weight.device))
