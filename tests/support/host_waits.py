"""Counts the calls that would make the host wait for a CUDA device, where there is none: all of them, on the CPU."""

import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

READS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__array__",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__format__",
    "__repr__",
    "nonzero",
    "argwhere",
    "masked_select",
    "unique",
    "equal",
    "allclose",
    "is_nonzero",
    "__contains__",
    "synchronize",
}
"""Functions that read numbers of a tensor, or a shape that depends on them."""
MADE = {"tensor", "as_tensor", "asarray"}
"""Functions that, given a device, copy numbers of the host there and wait."""


class HostWaits(TorchFunctionMode):
    """Within a ``with`` block, notes where such a call was made, as lines of this project's code."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in READS or (name in MADE and kwargs.get("device") is not None) or _copies(name, args, kwargs):
            self.places.append(f"{name} at {_place()}")
        return func(*args, **kwargs)


def _copies(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call moves a tensor to another device and waits, or chooses elements by a condition."""
    if name == "to":
        named = any(isinstance(arg, torch.device | str) for arg in args[1:]) or "device" in kwargs
        return named and not kwargs.get("non_blocking", False)
    if name in {"__getitem__", "__setitem__"}:
        indices: Iterable[Any] = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
    return name == "where" and len(args) + len(kwargs) == 1


def _place() -> str:
    ours = [frame for frame in traceback.extract_stack() if "underpaint_server" in frame.filename]
    return f"{ours[-1].filename.rpartition('underpaint_server/')[2]}:{ours[-1].lineno}" if ours else "a test"
