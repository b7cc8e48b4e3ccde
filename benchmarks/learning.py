"""The derivative by the mixing weights, step by step against one graph over all steps: accuracy, memory, time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import Tensor
from underpaint_server.backends import load
from underpaint_server.backends.model import ModelBackend
from underpaint_server.diffusion.ddim import move
from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.jobs import Sampler
from underpaint_server.methods.disentangled.gradient import backward
from underpaint_server.methods.disentangled.steps import Mixing, sample
from underpaint_server.rows import Batch, Embed, Row, Steps
from underpaint_server.settings import Settings

from benchmarks import cases
from benchmarks.report import Report, Table, console, spread

ABOUT = (
    "The derivative of a drawing by its mixing weights (embedded model, float32, DDIM, guidance 3), twice: by one "
    "graph over all steps, and step by step as the server learns, where the states of one run are kept and each step "
    "is computed again under gradients. Memory is what backpropagation keeps beside the weights: bytes of saved "
    "tensors, each storage counted once, at its largest. Times are of the forward run and of the way back, "
    "alternating; medians, with smallest and largest."
)
T = TypeVar("T")
GUIDANCE = 3.0
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Measured:
    """One derivative, computed in one graph and step by step."""

    steps: int
    relative_error: float
    """Largest absolute difference of the two, divided by the largest component."""
    graph_bytes: int
    stepwise_bytes: int
    graph_s: float
    stepwise_s: float


def run(quick: bool) -> Report:
    """Run the benchmark; see the module."""
    lengths, repeats = ((5, 10), 1) if quick else ((5, 10, 20, 50), 3)
    backend = load("", "underpaint-mini", Settings())
    assert isinstance(backend, ModelBackend)
    measured: list[Measured] = []
    for steps in lengths:
        measured += [_measure(backend, steps) for _ in range(repeats + 1)][1:]  # the first is warm-up
        console.print(f"{steps} steps: {measured[-1].graph_bytes / MIB:.0f} MiB in one graph")
    last = [m for m in measured if m.steps == lengths[-1]]
    return Report(
        name="learning",
        about=ABOUT,
        tables=(_table(measured, lengths),),
        findings=(
            f"The derivatives agree to {max(m.relative_error for m in measured):.1e} of their largest component.",
            f"One graph over {last[0].steps} steps keeps {last[0].graph_bytes / MIB:.0f} MiB; step by step the most is "
            f"{last[0].stepwise_bytes / MIB:.1f} MiB, whatever the number of steps.",
        ),
        figures={"measured": [asdict(item) for item in measured]},
    )


def _measure(backend: ModelBackend, steps: int) -> Measured:
    task = _mixing(backend, steps)
    weights = [1 - k / steps for k in range(steps)]
    cotangent = standard_normal(tuple(task.start.shape), seed=2, purpose="cotangent")
    began = time.perf_counter()
    with _saved(backend) as graph:
        expected = _in_one_graph(backend, task, weights, cotangent)
    graph_s = time.perf_counter() - began
    began = time.perf_counter()
    drawn = _drive(backend, sample(task, weights))
    with _saved(backend) as stepwise:
        derivative = _drive(backend, backward(task, drawn, weights, cotangent), stepwise)
    stepwise_s = time.perf_counter() - began
    error = float((derivative - expected).abs().max() / expected.abs().max())
    return Measured(steps, error, graph.largest, stepwise.largest, graph_s, stepwise_s)


def _mixing(backend: ModelBackend, steps: int) -> Mixing:
    case = cases.load()[0]
    texts = (case.source_prompt, case.target_prompt, "")
    source, target, negative = (
        backend.predict(Batch([Embed(text)], backend.minimum(Embed)))[0].prompt_embeds.clone() for text in texts
    )
    info = backend.facts.info
    start = standard_normal(backend.facts.latent_shape(info.width, info.height), seed=1, purpose="start")
    return Mixing(backend.facts.schedule.grid(steps), source, target, negative, GUIDANCE, Sampler.DDIM, start, None)


def _in_one_graph(backend: ModelBackend, task: Mixing, weights: list[float], cotangent: Tensor) -> Tensor:
    mixing_weights = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
    latents = task.start
    unet = backend.network
    for i, (noisy, clean) in enumerate(zip(task.grid[:0:-1], task.grid[-2::-1], strict=True)):
        text = mixing_weights[i] * task.source_embeds + (1 - mixing_weights[i]) * task.target_embeds
        texts = torch.stack([task.negative_embeds.double(), text]).float()
        away, towards = unet(torch.stack([latents, latents]).float(), noisy.timestep, texts).sample.double()
        latents = move(latents, away + GUIDANCE * (towards - away), noisy, clean)
    return torch.autograd.grad(latents, mixing_weights, cotangent)[0]


# --- memory -------------------------------------------------------------------------------------------------------


class _Saved:
    """Counts the bytes that autograd saves for backpropagation, each storage once and without the model's weights."""

    def __init__(self, weights: set[int]) -> None:
        self.largest = 0
        self._weights = weights
        self._bytes_of: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._bytes_of[storage.data_ptr()] = storage.nbytes()
            self.largest = max(self.largest, sum(self._bytes_of.values()))
        return tensor

    def begin(self) -> None:
        """Start a new graph; what the last one saved is free."""
        self._bytes_of.clear()


@contextmanager
def _saved(backend: ModelBackend) -> Iterator[_Saved]:
    weights = {weight.untyped_storage().data_ptr() for weight in backend.network.parameters()}
    saved = _Saved(weights)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        yield saved


def _drive(backend: ModelBackend, steps: Steps[T], saved: _Saved | None = None) -> T:
    try:
        group = next(steps)
        while True:
            if saved is not None:
                saved.begin()
            group = steps.send(backend.predict(_batch(backend, list(group))))
    except StopIteration as end:
        result: T = end.value
        return result


def _batch(backend: ModelBackend, rows: list[Row]) -> Batch:
    return Batch(rows, max(len(rows), backend.minimum(type(rows[0]))))


# --- tables -------------------------------------------------------------------------------------------------------


def _table(measured: list[Measured], lengths: tuple[int, ...]) -> Table:
    columns = (
        "steps", "relative difference", "one graph MiB", "step by step MiB", "one graph s", "step by step s", "ratio",
    )  # fmt: skip
    rows = []
    for steps in lengths:
        mine = [m for m in measured if m.steps == steps]
        rows.append((
            f"{steps}", f"{max(m.relative_error for m in mine):.1e}", f"{mine[0].graph_bytes / MIB:.1f}",
            f"{mine[0].stepwise_bytes / MIB:.1f}", spread([m.graph_s for m in mine]),
            spread([m.stepwise_s for m in mine]), spread([m.stepwise_s / m.graph_s for m in mine]),
        ))  # fmt: skip
    return Table("The derivative of one drawing by its weights", columns, tuple(rows))
