"""The networks of a checkpoint as graphs: modules whose inputs and outputs are tensors with known axes.

A family calls them by name. A runtime may compile them and take the modules' place, see
:mod:`underpaint_server.backends.runtime`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Function = Callable[..., Tensor]
"""Function of batches: takes the inputs of a :class:`Graph`, in their order, and returns its output."""

UNET, ENCODER, DECODER, TEXT_ENCODER = "unet", "encoder", "decoder", "text_encoder"
"""Names of graphs."""


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of any length that is a multiple of ``unit``."""

    name: str
    unit: int = 1


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a graph. ``axes`` are those after the first, which is the batch."""

    name: str
    axes: tuple[int | Axis, ...] = ()
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """One network. ``module.forward`` takes the inputs in their order and returns one tensor, batch first."""

    module: nn.Module
    inputs: tuple[Input, ...]


class Wrapped(nn.Module):
    """A module whose forward pass is a given function of other modules."""

    def __init__(self, function: Function, *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(modules)

    def forward(self, *inputs: Tensor) -> Tensor:
        """``function`` of the inputs."""
        return self.function(*inputs)


def latents(channels: int, unit: int, dtype: torch.dtype = torch.float32) -> Input:
    """Latents whose height and width are multiples of ``unit``."""
    return Input("latents", (channels, Axis("height", unit), Axis("width", unit)), dtype)


def functions(graphs: Mapping[str, Graph]) -> dict[str, Function]:
    """The graphs' own modules, by name."""
    return {name: graph.module for name, graph in graphs.items()}
