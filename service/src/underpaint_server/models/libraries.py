"""The classes of diffusers and transformers that checkpoints are read with.

A plain import also loads torch's compiler and its distributed tensors, 900 modules that the server has no use for: it
compiles nothing and runs on one device. Hiding both meanwhile halves the time that the imports and the loading take.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_COMPILER = "torch._dynamo"


@contextmanager
def eager_torch() -> Iterator[None]:
    """Within the block, torch seems to have no torch.distributed, and of its compiler only the marks on functions.

    Nothing changes where the compiler is loaded already. After the block, whoever imports it gets the real one.
    """
    if _COMPILER in sys.modules:
        yield
        return
    compiler, item_access = ModuleType(_COMPILER), ModuleType(f"{_COMPILER}._trace_wrapped_higher_order_op")
    marks: dict[str, Any] = {"allow_in_graph": _mark, "assume_constant_result": _mark, "disable": _mark}
    vars(compiler).update(marks, __path__=[])
    vars(item_access).update(TransformGetItemToIndex=_transform_get_item_to_index)
    hidden = {compiler.__name__: compiler, item_access.__name__: item_access}
    is_available = torch.distributed.is_available
    sys.modules.update(hidden)
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = is_available
        for name in hidden:
            sys.modules.pop(name, None)


@contextmanager
def reading() -> Iterator[None]:
    """Within the block, networks are built and filled without what :func:`eager_torch` hides.

    Transformers builds a network without memory first. To fill such a tensor with normal numbers does nothing, but torch
    loads sympy for it.
    """
    normal = nn.init.normal_

    def normal_(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        return tensor if tensor.is_meta else normal(tensor, *args, **options)

    with eager_torch():
        nn.init.normal_ = normal_
        try:
            yield
        finally:
            nn.init.normal_ = normal


def _mark(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """The compiler's decorators change how a function is compiled, and nothing else."""
    return (lambda later: later) if function is None else function


def _transform_get_item_to_index() -> Any:
    """The compiler's own, loaded where it is used: for masks of ``vmap``, which CLIP does not have."""
    return import_module(f"{_COMPILER}._trace_wrapped_higher_order_op").TransformGetItemToIndex()


# Should another version of the libraries need more of the compiler than it finds here, the plain imports load it.
with suppress(Exception), eager_torch():
    for _name in ("diffusers.models.unets", "diffusers.models.autoencoders", "transformers.models.clip.modeling_clip"):
        import_module(_name)

from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel, UNet2DModel  # noqa: E402
from diffusers.utils import logging as diffusers_logging  # noqa: E402
from transformers import AutoModel, CLIPTextModel, CLIPTokenizer  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

__all__ = [
    "AutoModel",
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTokenizer",
    "ModelMixin",
    "UNet2DConditionModel",
    "UNet2DModel",
]
