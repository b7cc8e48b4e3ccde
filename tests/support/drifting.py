"""A network whose bits depend on the number of rows of its pass, as in bfloat16 on a CPU with AMX."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from underpaint_server.backends.model import ModelBackend, edit_loss
from underpaint_server.backends.torch_ import TorchRuntime
from underpaint_server.models import checkpoint, families
from underpaint_server.settings import Settings


def load_drifting(settings: Settings) -> ModelBackend:
    """The embedded model; its linear layers add in an order that the size of the pass decides.

    What is measured of it is kept apart from what is measured of the embedded model, whose digest it has.
    """
    settings = settings.model_copy(update={"cache_dir": f"{settings.cache_dir}/drifting"})
    directory = checkpoint.resolve("", allow_network=False)
    model = families.load(directory, dtype=getattr(torch, settings.dtype), device=torch.device("cpu"))
    for module in model.unet.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(_in_parts, module)  # type: ignore[method-assign]
    return ModelBackend(model, "mini", settings, TorchRuntime, edit_loss(model, directory, "mini", settings))


def _in_parts(linear: nn.Linear, x: Tensor) -> Tensor:
    """The layer's output, summed over one to five parts of its inputs."""
    if x.dim() == 2:  # embeds timesteps, in tiles of one height
        return functional.linear(x, linear.weight, linear.bias)
    parts = 1 + len(x) % 5
    terms = zip(x.chunk(parts, -1), linear.weight.chunk(parts, 1), strict=True)
    total = torch.stack([functional.linear(part, weight) for part, weight in terms]).sum(0)
    return total if linear.bias is None else total + linear.bias
