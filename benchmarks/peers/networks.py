"""The embedded model's U-Net in the ways in which others run it, behind one signature."""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from underpaint_mini import MODEL
from underpaint_server.cores import usable_cores

diffusers_logging.set_verbosity_error()  # it advises to install accelerate

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latents (b, c, h, w), timesteps (b,) int64, prompt embeddings (b, tokens, width)), all float32 but the timesteps, to
the noise predictions (b, c, h, w), float32."""
CACHE = Path(".cache/peers")
"""Folder for exported and compiled networks and for the environment of the other serving frameworks."""
SIZES = (32, 16, 8, 4, 2, 1)
"""Batch sizes that networks are compiled for."""
_INPUTS = ("latents", "timesteps", "embeds")


def load_unet(dtype: torch.dtype) -> Any:
    """The U-Net as diffusers loads it."""
    return UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet", torch_dtype=dtype).eval()


def eager(dtype: torch.dtype) -> Network:
    """The U-Net of diffusers in eager mode."""
    unet = load_unet(dtype)

    def predict(latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        out: Tensor = unet(latents.to(dtype), timesteps, embeds.to(dtype), return_dict=False)[0]
        return out.float()

    return predict


def export(shapes: Sequence[tuple[int, ...]]) -> Path:
    """The U-Net as ONNX with a free batch size; ``shapes`` are those of one row's inputs. Written once."""
    path = CACHE / f"unet-{torch.__version__}.onnx"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    module = _Positional(load_unet(torch.float32))
    latents, _, embeds = shapes
    example = (torch.zeros(2, *latents), torch.zeros(2, dtype=torch.int64), torch.zeros(2, *embeds))
    partial = path.with_suffix(f".{os.getpid()}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's remarks about traced shapes, and that it is not the newest
        torch.onnx.export(
            module, example, str(partial), dynamo=False, input_names=list(_INPUTS), output_names=["noise"],
            dynamic_axes={name: {0: "b"} for name in _INPUTS},
        )  # fmt: skip
    partial.replace(path)
    return path


class OpenVino:
    """The exported U-Net compiled by OpenVINO, one static shape for each batch size.

    Each size is compiled for a single stream with all cores, and for two streams that take half of the rows each; the
    faster one is used. ``streams`` forces 1 or 2. Rows that are no such size are computed in several passes.
    """

    def __init__(self, precision: str, shapes: Sequence[tuple[int, ...]], streams: int | None = None) -> None:
        import openvino

        self.precision = precision
        """Number format that it computes in: "bf16" or "f32"."""
        self._shapes, self._streams = shapes, streams
        self._core: Any = openvino.Core()
        self._core.set_property({"CACHE_DIR": str(CACHE / "openvino")})
        self._model: Any = self._core.read_model(str(export(shapes)))
        self._options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": str(usable_cores())}
        self._requests: dict[int, list[Any]] = {}
        self.chosen: dict[int, int] = {}
        """Batch size -> number of streams that was faster."""

    def __call__(self, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        """See :data:`Network`."""
        arrays = [tensor.contiguous().numpy() for tensor in (latents, timesteps, embeds)]
        parts, first = [], 0
        while first < len(latents):
            size = next(size for size in SIZES if size <= len(latents) - first)
            parts.append(self._pass([array[first : first + size] for array in arrays]))
            first += size
        return torch.cat(parts)

    def prepare(self, sizes: Sequence[int] = SIZES) -> None:
        """Compile for these sizes now."""
        for size in sizes:
            self._of_size(size)

    def _pass(self, arrays: list[Any]) -> Tensor:
        requests = self._of_size(len(arrays[0]))
        share = len(arrays[0]) // len(requests)
        for k, request in enumerate(requests):
            mine = [array[k * share : (k + 1) * share] for array in arrays]
            request.start_async(dict(zip(_INPUTS, mine, strict=True)))
        for request in requests:
            request.wait()
        return torch.cat([torch.from_numpy(request.get_output_tensor().data.copy()) for request in requests])

    def _of_size(self, size: int) -> list[Any]:
        if size not in self._requests:
            options = [self._streams] if self._streams is not None else [1, 2]
            tried = {n: self._compiled(size, n) for n in options if n <= max(1, min(size, usable_cores()))}
            tried = tried or {1: self._compiled(size, 1)}
            best = min(tried, key=lambda n: self._seconds(tried[n], size)) if len(tried) > 1 else next(iter(tried))
            self._requests[size], self.chosen[size] = tried[best], best
        return self._requests[size]

    def _compiled(self, size: int, streams: int) -> list[Any]:
        model = self._model.clone()
        share = size // streams
        model.reshape({name: [share, *shape] for name, shape in zip(_INPUTS, self._shapes, strict=True)})
        compiled = self._core.compile_model(model, "CPU", {**self._options, "NUM_STREAMS": str(streams)})
        return [compiled.create_infer_request() for _ in range(streams)]

    def _seconds(self, requests: list[Any], size: int) -> float:
        self._requests[size] = requests
        rows = example(size, self._shapes)
        times = [_timed(lambda: self._pass([tensor.numpy() for tensor in rows])) for _ in range(8)]
        return median(times[2:])


def best_precision() -> str:
    """OpenVINO's name of bfloat16 where the CPU computes in it, else of float32."""
    import openvino

    return "bf16" if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"


def onnx_runtime(shapes: Sequence[tuple[int, ...]]) -> Network:
    """The exported U-Net in an ONNX Runtime session, float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow whatever runs after it
    session = onnxruntime.InferenceSession(str(export(shapes)), options, providers=["CPUExecutionProvider"])

    def predict(latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        arrays = (latents.numpy(), timesteps.numpy(), embeds.numpy())
        return torch.from_numpy(session.run(None, dict(zip(_INPUTS, arrays, strict=True)))[0])

    return predict


class _Positional(nn.Module):
    """A U-Net with positional arguments and a tensor as its result, for the exporter."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        out: Tensor = self.unet(latents, timesteps, embeds, return_dict=False)[0]
        return out


def example(size: int, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """Random inputs of a network for ``size`` rows."""
    generator = torch.Generator().manual_seed(0)
    latents, _, embeds = shapes
    return (
        torch.randn(size, *latents, generator=generator),
        torch.randint(0, 1000, (size,), generator=generator),
        torch.randn(size, *embeds, generator=generator),
    )


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
