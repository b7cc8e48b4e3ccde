"""Run a method's generator against a network given as a plain function: no engine, no batching."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from underpaint_server.rows import Denoise, Row, Steps

T = TypeVar("T")


def drive(steps: Steps[T], answer: Callable[[Row], Any]) -> tuple[T, list[list[Any]]]:
    """What the generator returns, and the groups it asked for."""
    groups: list[list[Any]] = []
    try:
        group = next(steps)
        while True:
            groups.append(list(group))
            group = steps.send([answer(row) for row in group])
    except StopIteration as end:
        return end.value, groups


class RandomNetwork:
    """A fixed, smooth, strongly nonlinear function of latents, timestep and text: harder to invert than a real one."""

    def __init__(self, channels: int = 4, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.dtype = dtype
        self.mix = torch.randn((3, channels, channels), generator=generator, dtype=torch.float64)

    def __call__(self, row: Row) -> Tensor:
        assert isinstance(row, Denoise)
        x = row.latents.to(self.dtype)
        text = row.prompt_embeds.to(self.dtype).mean()
        first, second, third = self.mix.to(self.dtype)
        hidden = torch.einsum("ij,jhw->ihw", first, x) + row.timestep / 1000 + text
        out = torch.einsum("ij,jhw->ihw", second, hidden.sin()) + 0.3 * torch.einsum("ij,jhw->ihw", third, x).tanh()
        return out.double()
