"""Random numbers of a job: from its seed alone, never from what runs beside it or what ran before."""

from hashlib import sha256

import torch
from torch import Tensor


def standard_normal(shape: tuple[int, ...], *, seed: int, purpose: str, index: int = 0) -> Tensor:
    """Standard normal float64 numbers of the given shape, on the CPU.

    Drawn in float32 on the CPU, so that they are the same on every device. ``purpose`` and ``index`` keep the draws of
    one job apart.
    """
    digest = sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32).double()
