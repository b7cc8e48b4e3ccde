"""EDICT as its authors' code computes it: everything in float64, one call of the U-Net for each prediction.

Written from the equations; only the arithmetic and the number of calls are theirs. The levels are our server's (first
timestep 1 instead of 0), so that the pictures can be compared.
"""

import torch
from torch import Tensor

from benchmarks.peers.loops import Loops
from benchmarks.peers.networks import load_unet


class OfficialEdict(Loops):
    """Loops whose U-Net, autoencoder, text encoder and latents are float64, without batches."""

    def __init__(self) -> None:
        super().__init__(_unused, torch.float64)
        self._unet = load_unet(torch.float64)

    def _predict(self, latents: Tensor, t: Tensor | int, embeds: Tensor) -> Tensor:
        calls = zip(torch.split(latents, 1), torch.split(embeds, 1), strict=True)
        return torch.cat([self._unet(row, int(t), embed, return_dict=False)[0] for row, embed in calls])


def _unused(latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
    raise NotImplementedError
