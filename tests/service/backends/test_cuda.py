"""What is made for a CUDA device, as far as it can be tried without one. Where torch's own part is needed, it is
replaced by one that notes what is asked of it."""

from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from support.engine import Bench
from support.jobs import edit_job
from torch import Tensor
from underpaint_server.backends import cuda, torch_
from underpaint_server.backends.model import ModelBackend, load_model
from underpaint_server.backends.protocol import DeviceLost
from underpaint_server.backends.torch_ import TorchRuntime
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.models import checkpoint, families
from underpaint_server.models.families import Family
from underpaint_server.models.graphs import DECODER, ENCODER, UNET
from underpaint_server.models.taps import Handler
from underpaint_server.settings import Settings


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    log: list[str]
    fails = ""

    def __init__(self) -> None:
        self.name = f"graph {sum(line.startswith('begin') for line in self.log)}"

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert (pool, capture_error_mode) == ((0, 1), "thread_local")
        self._do("begin")

    def capture_end(self) -> None:
        self._do("end")

    def replay(self) -> None:
        self._do("replay")

    def _do(self, what: str) -> None:
        self.log.append(f"{what} {self.name}")
        if self.log[-1] == self.fails:
            raise torch.AcceleratorError("operation not permitted when stream is capturing")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Logged", (Graph,), {"log": log}))
    return log


def network(log: list[str], handler: Handler) -> Tensor:
    x = torch.zeros(2)
    for site in ("mid", "up_0"):
        x = x + 1
        log.append(f"compute {site} {x[0]:.0f}")
        x = x if (given := handler(site, x)) is None else given
    log.append("compute rest")
    return x * 2


def test_a_call_is_recorded_as_one_graph_for_each_part(log: list[str]) -> None:
    cut_at: list[Tensor] = []

    def function(handler: Handler) -> Tensor:
        def kept(site: str, activation: Tensor) -> Tensor | None:
            given = handler(site, activation)
            assert given is not None
            assert given.data_ptr() != activation.data_ptr(), "only what a copy holds survives the rest of the network"
            cut_at.append(given)
            return given

        return network(log, kept)

    recording = cuda._capture(function, (0, 1))
    assert log == [
        "begin graph 0", "compute mid 1", "end graph 0",
        "begin graph 1", "compute up_0 2", "end graph 1",
        "begin graph 2", "compute rest", "end graph 2",
    ]  # fmt: skip
    log.clear()
    between: list[tuple[str, Tensor]] = []
    output = recording.replay(lambda site, activation: between.append((site, activation)))
    assert log == ["replay graph 0", "replay graph 1", "replay graph 2"]
    assert [site for site, _ in between] == ["mid", "up_0"]
    assert all(given is kept for (_, given), kept in zip(between, cut_at, strict=True))
    assert output is recording.replay(lambda site, activation: None)


def test_without_a_cut_it_is_one_graph(log: list[str]) -> None:
    recording = cuda._capture(lambda handler: network(log, lambda site, activation: None), (0, 1))
    recording.replay(lambda site, activation: log.append("between"))
    assert [line for line in log if "compute" not in line] == ["begin graph 0", "end graph 0", "replay graph 0"]


def test_a_capture_is_ended_when_the_network_raises(log: list[str]) -> None:
    def function(handler: Handler) -> Tensor:
        raise ValueError("no kernel")

    with pytest.raises(ValueError, match="no kernel"):
        cuda._capture(function, (0, 1))
    assert log == ["begin graph 0", "end graph 0"]


@pytest.mark.parametrize("fails", ["begin graph 0", "end graph 0", "begin graph 1", "end graph 2"])
def test_whatever_fails_in_a_capture_is_an_error_that_has_the_pass_called(
    log: list[str], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    monkeypatch.setattr(torch.cuda.CUDAGraph, "fails", fails)
    with pytest.raises(RuntimeError, match="not permitted"):
        cuda._capture(partial(network, log), (0, 1))


class Event:
    """In place of torch.cuda.Event."""

    clock = 0.0
    broken = False

    def __init__(self, enable_timing: bool, blocking: bool) -> None:
        assert enable_timing
        assert blocking

    def record(self, stream: object) -> None:
        Event.clock += 250
        self.at = Event.clock

    def synchronize(self) -> None:
        if Event.broken:
            raise torch.AcceleratorError("an illegal memory access")

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)


@pytest.fixture(scope="module")
def backend() -> ModelBackend:
    return load_model("", "mini", Settings(exact_batching="pinned"), None, torch.float32, TorchRuntime)


@pytest.mark.usefixtures("events")
def test_a_pass_takes_the_time_between_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = cuda.CudaPass(torch.device("cpu"))
    begun.queued()
    assert begun.wait() == 0.25
    monkeypatch.setattr(Event, "broken", True)
    with pytest.raises(DeviceLost, match="illegal"):
        begun.wait()


@pytest.mark.usefixtures("events")
def test_passes_of_a_model_are_timed_by_the_device(backend: ModelBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.unfinished() is None
    monkeypatch.setattr(backend, "_begin_pass", partial(cuda.CudaPass, torch.device("cpu")))
    with Bench(backend) as bench:
        bench.run([edit_job("mini", 64, SdEdit(0.9, 4))])
        assert [one.duration_s for one in bench.passes] == [0.25] * 3


def test_attention_is_torchs_own(backend: ModelBackend) -> None:
    """scaled_dot_product_attention, which chooses a fused kernel; not one of the slower processors of diffusers."""
    network: Any = backend.network
    processors = network.attn_processors.values()
    assert processors
    assert {type(one) for one in processors} == {AttnProcessor2_0}


def test_suited_to_cuda_a_model_is_the_same_but_for_rounding() -> None:
    plain, suited = (_model() for _ in range(2))
    torch_._suit_cuda(suited)
    assert suited.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    was: list[tuple[bool, bool, bool]] = []
    for name in (ENCODER, DECODER, UNET):
        suited.graphs[name].module.register_forward_hook(lambda *_: was.append(_flags()))
    image = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    with torch.inference_mode():
        latents = plain.encode(image)
        torch.testing.assert_close(suited.encode(image), latents, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(suited.decode(latents), plain.decode(latents), rtol=1e-3, atol=1e-3)
        text = torch.zeros(1, *plain.embeds_shape)
        inputs = latents.float(), torch.tensor([500]), text
        torch.testing.assert_close(suited.compute[UNET](*inputs), plain.compute[UNET](*inputs), rtol=1e-3, atol=1e-3)
    assert was == [(True, False, True), (True, False, True), (False, False, True)], "TF32, benchmark, deterministic"


def _flags() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic


def _model() -> Family:
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    directory = checkpoint.resolve("", allow_network=False)
    return families.load(directory, dtype=torch.float32, device=torch.device("cpu"))
