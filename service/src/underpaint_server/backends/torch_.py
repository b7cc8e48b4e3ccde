"""Runtime of torch in eager mode, on the CPU or one CUDA device. It can compute every model."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from underpaint_server.backends.cuda import CudaRecorder
from underpaint_server.backends.exactness import Survey
from underpaint_server.backends.model import MINIMUM, ModelBackend, device_of, load_model
from underpaint_server.backends.recorded import Recorded, Recorder
from underpaint_server.backends.runtime import NoisePreds, Passes
from underpaint_server.models.families import Family
from underpaint_server.models.graphs import DECODER, ENCODER, UNET, Function
from underpaint_server.models.taps import Taps
from underpaint_server.rows import Captured, Denoise, Embed, Row
from underpaint_server.settings import Settings


def load(location: str, model_id: str, settings: Settings, survey: Survey | None) -> ModelBackend:
    """See :class:`underpaint_server.backends.Loader`.

    By default the U-Net is in bfloat16 on a GPU and in float32 on a CPU: many CPUs gain little from bfloat16 with
    torch, and its bits depend on the number of rows of a pass there.
    """
    default = "float32" if device_of(settings).type == "cpu" else "bfloat16"
    dtype = default if settings.dtype == "auto" else settings.dtype
    return load_model(location, model_id, settings, survey, getattr(torch, dtype), TorchRuntime)


class TorchRuntime:
    """See :class:`underpaint_server.backends.runtime.Runtime`.

    On CUDA, weights and activations are in channels-last order, the autoencoder multiplies in TF32, and passes of the
    U-Net are recorded and replayed, see :mod:`underpaint_server.backends.recorded`; so they are with a ``recorder``.
    """

    name = "torch"
    version = str(torch.__version__)
    isolate_rows = None

    def __init__(self, model: Family, settings: Settings, recorder: Recorder | None = None) -> None:
        self._taps = Taps(model.unet)
        if model.unet.device.type == "cuda":
            recorder = CudaRecorder(model.unet.device)
            _suit_cuda(model)
        else:
            tile_conditioning(model.unet)
        self._recorded: Recorded | None = None
        if recorder is not None:
            self._recorded = model.compute[UNET] = Recorded(model.compute[UNET], self._taps, recorder)
        self.sites = self._taps.sites
        self.dtype = str(model.unet.dtype).removeprefix("torch.")

    def answers(self, noise_preds: NoisePreds, rows: list[Denoise]) -> list[Tensor | Captured]:
        """See :class:`Runtime`."""
        return self._taps.answers(noise_preds, rows)

    def passes(self, kind: type[Row]) -> Passes:
        """See :class:`Runtime`. torch chooses other kernels for one image than for several, so no pass has one row.

        Passes of the autoencoder and the text encoder have a fixed size: they are a few percent of a job's work, so
        padding costs less than measuring.
        """
        if kind is Denoise:
            return Passes(minimum=MINIMUM)
        size = 4 if kind is Embed else MINIMUM
        return Passes(minimum=size, batch_class=size)

    def prepare(self, run_pass: Callable[[int], object], sizes: Sequence[int]) -> None:
        """See :class:`Runtime`."""
        if self._recorded is not None:
            self._recorded.prepare(run_pass, sizes)


def _suit_cuda(model: Family) -> None:
    """Weights in the order of cuDNN's fastest kernels, and an autoencoder on tensor cores.

    TF32 rounds the autoencoder's numbers to 10 bits, as float16 does, and keeps the range of float32, which its
    activations need. In float32 proper it would take as long as a quarter of an edit.
    """
    for graph in model.graphs.values():
        graph.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name in (ENCODER, DECODER):
        if name in model.compute:
            model.compute[name] = partial(_in_tf32, model.compute[name])


def _in_tf32(function: Function, *inputs: Tensor) -> Tensor:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
        return function(*inputs)


class TiledLinear(nn.Module):
    """A linear layer that multiplies two-dimensional inputs in tiles of ``TILE`` rows.

    The layers that embed timesteps have one input row per image, so the height of their matrices is the size of the
    pass, and the library chooses its block size by that height. With a fixed height the order of additions is fixed.
    """

    TILE = 16
    """Rows of a tile; the last one is padded with zeros."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_features) or (b, tokens, in_features) to the same with out_features."""
        if x.dim() != 2:
            return functional.linear(x, self.linear.weight, self.linear.bias)
        padded_x = functional.pad(x, (0, 0, 0, -len(x) % self.TILE))
        tiles = [self.linear(padded_x[i : i + self.TILE]) for i in range(0, len(padded_x), self.TILE)]
        return torch.cat(tiles)[: len(x)]


def tile_conditioning(unet: nn.Module) -> None:
    """Replace the layers that embed timesteps by :class:`TiledLinear`."""
    for module in list(unet.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name in {"linear_1", "linear_2", "time_emb_proj"}:
                setattr(module, name, TiledLinear(child))
