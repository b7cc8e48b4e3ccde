"""Rows per second of each network alone, by the number of rows of a pass."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor
from underpaint_server.backends.protocol import Backend
from underpaint_server.rows import Batch, Denoise, Embed

from benchmarks.peers.networks import Network, OpenVino, eager, example, onnx_runtime
from benchmarks.peers.setup import Scale, backend
from benchmarks.report import Table, console

OURS = "the server's network"
TORCH = "the server's torch backend, float32"
LARGEST = 32
"""Most rows of a pass that is measured."""
Pass = Callable[[int], object]
"""Computes one pass of that many rows."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows per second of every network at every size, one figure a round."""

    rates: dict[str, dict[int, list[float]]]
    ceilings: dict[str, float]
    """Number format -> GFLOP/s of a large matrix product in the same run."""

    def rate(self, name: str, size: int) -> float:
        """Median rows per second."""
        return statistics.median(self.rates[name][size])

    def best(self, name: str) -> float:
        """The highest median over all sizes."""
        return max(self.rate(name, size) for size in self.rates[name])

    def table(self) -> Table:
        """Rows per second by network and size."""
        sizes = list(next(iter(self.rates.values())))
        rows = tuple((name, *(f"{self.rate(name, size):.0f}" for size in sizes)) for name in self.rates)
        note = "Matrix products of 2048 x 2048 in the same run: " + ", ".join(
            f"{value:.0f} GFLOP/s {name}" for name, value in self.ceilings.items()
        )
        return Table("Network alone: rows/s by rows of a pass", ("network", *map(str, sizes)), rows, (note + ".",))


def measure(scale: Scale, ours: Backend, openvino: OpenVino | None) -> Measured:
    """Measure all networks in turn; ``openvino`` is the network of the diffusers loops, None where it cannot run."""
    passes = _passes(ours, openvino)
    rates: dict[str, dict[int, list[float]]] = {name: {size: [] for size in scale.sizes} for name in passes}
    with torch.inference_mode(), Progress(console=console) as progress:
        task = progress.add_task("networks alone", total=scale.pass_rounds * len(passes) * len(scale.sizes))
        for number in range(scale.pass_rounds):
            for size in scale.sizes:
                for name, compute in passes.items():
                    if number == 0:
                        compute(size)  # compiles
                    rates[name][size].append(_rate(compute, size, scale.cell_s))
                    progress.advance(task)
        ceilings = {str(dtype).removeprefix("torch."): _ceiling(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return Measured(rates, ceilings)


def _passes(ours: Backend, openvino: OpenVino | None) -> dict[str, Pass]:
    shapes = row_shapes(ours)
    found = {
        f"{OURS} ({ours.facts.info.dtype})": _of_backend(ours),
        TORCH: _of_backend(backend("torch:", dtype="float32", exact_batching="pinned")),
        "the server's torch backend, bfloat16": _of_backend(
            backend("torch:", dtype="bfloat16", exact_batching="pinned")
        ),
        "diffusers eager, float32": _of_network(eager(torch.float32), shapes),
        "diffusers eager, bfloat16": _of_network(eager(torch.bfloat16), shapes),
    }
    if openvino is not None:
        found["OpenVINO, f32"] = _of_network(OpenVino("f32", shapes), shapes)
        if openvino.precision == "bf16":
            found["OpenVINO, bf16"] = _of_network(openvino, shapes)
    try:
        found["ONNX Runtime, float32"] = _of_network(onnx_runtime(shapes), shapes)
    except ImportError as error:
        console.print(f"skipped: ONNX Runtime, because {error}")
    return found


def row_shapes(ours: Backend) -> tuple[tuple[int, ...], ...]:
    """Shapes of one row's latents, timestep and prompt embeddings, at the model's own size."""
    facts = ours.facts
    return facts.latent_shape(facts.info.width, facts.info.height), (), embeds_shape(ours)


def embeds_shape(ours: Backend) -> tuple[int, ...]:
    """(tokens, width) of prompt embeddings."""
    return tuple(_embed(ours).shape)


def _embed(ours: Backend) -> Tensor:
    size = ours.batch_class(Embed, ()) or ours.minimum(Embed)
    embeds: Tensor = ours.predict(Batch([Embed("a red apple")], size))[0].prompt_embeds
    return embeds


def _of_backend(ours: Backend) -> Pass:
    facts = ours.facts
    shape = facts.latent_shape(facts.info.width, facts.info.height)
    embeds = _embed(ours)
    smallest = ours.minimum(Denoise)
    rows = [Denoise(torch.randn(shape, dtype=torch.float64), 20 * k + 1, 0.5, embeds) for k in range(LARGEST)]
    return lambda size: ours.predict(Batch(rows[:size], max(size, smallest)))


def _of_network(network: Network, shapes: Sequence[tuple[int, ...]]) -> Pass:
    inputs = example(LARGEST, shapes)
    return lambda size: network(*(tensor[:size] for tensor in inputs))


def _rate(compute: Pass, size: int, seconds: float) -> float:
    """Rows per second: the median pass of ``seconds``, after one that is not counted."""
    compute(size)
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        began = time.perf_counter()
        compute(size)
        times.append(time.perf_counter() - began)
    return size / statistics.median(times)


def _ceiling(dtype: torch.dtype) -> float:
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times) / 1e9
