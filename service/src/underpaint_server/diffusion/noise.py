"""Random numbers of a job. They depend on its seed alone, not on other jobs."""

from hashlib import sha256

import torch
from torch import Tensor


def standard_normal(shape: tuple[int, ...], *, seed: int, purpose: str, index: int = 0) -> Tensor:
    """Standard normal numbers of the given shape, float64, on the CPU.

    They are sampled on the CPU in float32, so that they are the same for every device. ``purpose`` and ``index``
    distinguish the samples of one job.
    """
    digest = sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32).double()
