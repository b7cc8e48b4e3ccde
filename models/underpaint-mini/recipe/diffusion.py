"""What both denoisers share: the training loss, and dropped skips, so that the mid block carries the picture."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

DROP_SKIPS = 0.25
GAMMA, MOST = 5.0, 20.0
SKIPS = "res_hidden_states_tuple"

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class SkipDropper:
    """Zeroes the skips into a U-Net's deepest up blocks for the marked samples of a batch.

    Whatever lies below those blocks' resolution then has to pass the mid block, which makes it a bottleneck whose
    activation (h-space) means something.
    """

    def __init__(self, unet: nn.Module, blocks: int = 2) -> None:
        self._keep: torch.Tensor | None = None
        for block in unet.get_submodule("up_blocks").children():
            if blocks > 0:
                block.register_forward_pre_hook(self._drop, with_kwargs=True)
            blocks -= 1

    def mark(self, n: int, rng: torch.Generator) -> None:
        """Choose which of the next batch's ``n`` samples lose their skips; ``rng`` is on the network's device."""
        self._keep = torch.rand(n, 1, 1, 1, generator=rng, device=rng.device) >= DROP_SKIPS

    def _drop(self, _block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if SKIPS in kwargs:  # the conditional U-Net passes them by name, the unconditional one in second place
            return args, {**kwargs, SKIPS: self._dropped(kwargs[SKIPS])}
        return (args[0], self._dropped(args[1]), *args[2:]), kwargs

    def _dropped(self, skips: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return skips if self._keep is None else tuple(skip * self._keep.to(skip.dtype) for skip in skips)


class NoiseLoss:
    """Squared error of the predicted noise at random timesteps, weighted by the signal-to-noise ratio.

    Little noise weighs less (min-SNR; Hang et al., ICCV 2023). Much noise weighs more, up to ``MOST`` times: there the
    error of the noise is small although that of the picture is large, and what is drawn is decided there. In between
    it is the error of v = sqrt(alpha) noise - sqrt(1 - alpha) clean (Salimans and Ho, ICLR 2022).
    """

    def __init__(self, alphas_cumprod: torch.Tensor, device: torch.device) -> None:
        self._alphas = alphas_cumprod.to(device)
        snr = self._alphas / (1 - self._alphas)
        self._weight = snr.clamp_max(GAMMA) / snr * (1 + 1 / snr).clamp_max(MOST)

    def __call__(self, denoise: Denoiser, clean: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """``clean`` (n, c, h, w) on the device of ``rng``; ``denoise(noisy, timesteps)`` predicts the noise."""
        timesteps = self._timesteps(len(clean), rng)
        noise = torch.randn(clean.shape, generator=rng, device=clean.device)
        alpha = self._alphas[timesteps][:, None, None, None]
        predicted = denoise(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, timesteps)
        error = functional.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
        return (error * self._weight[timesteps]).mean()

    def _timesteps(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """One from each ``n``-th part of the schedule, so that batches differ less (Kingma et al., NeurIPS 2021)."""
        within = torch.rand(n, generator=rng, device=rng.device)
        share = (torch.arange(n, device=rng.device) + within) / n
        return (share * len(self._alphas)).long().clamp_max(len(self._alphas) - 1)
