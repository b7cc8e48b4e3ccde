"""What torch needs on a CUDA device: recording of passes as CUDA graphs, and their durations.

Nothing of this module runs without such a device; what uses it is tested with a recorder and a timer of the CPU.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from underpaint_server.backends.protocol import DeviceLost
from underpaint_server.backends.recorded import Between
from underpaint_server.models.taps import Handler


class CudaRecorder:
    """Records calls as CUDA graphs, which share one pool of memory; see :class:`Recorder`.

    They may share it because they are replayed one after another, and because each keeps its output and the activations
    at its cuts, which no later recording can then overwrite.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # the default one cannot be captured
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[Handler], Tensor]) -> "CudaRecording":
        """See :class:`Recorder`. A call is cut at a site by ending one graph there and beginning the next."""
        before = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            function(_copy)  # libraries choose their algorithms and reserve memory in the first call
            gc.collect()  # what is collected during a capture could end it
            torch.cuda.synchronize(self._stream.device)
            torch.cuda.empty_cache()  # the first call's memory would stay with this stream
            recording = _capture(function, self._pool)
        before.wait_stream(self._stream)
        return recording


class CudaRecording:
    """One CUDA graph, or several with a cut after each but the last; see :class:`Recording`."""

    def __init__(self, graphs: list[torch.cuda.CUDAGraph], cuts: list[tuple[str, Tensor]], output: Tensor) -> None:
        self._graphs = graphs
        self._cuts = cuts
        self._output = output

    def replay(self, between: Between) -> Tensor:
        """See :class:`Recording`."""
        for graph, (site, activation) in zip(self._graphs, self._cuts, strict=False):
            graph.replay()
            between(site, activation)
        self._graphs[-1].replay()
        return self._output


def _capture(function: Callable[[Handler], Tensor], pool: Any) -> CudaRecording:
    graphs: list[torch.cuda.CUDAGraph] = []
    cuts: list[tuple[str, Tensor]] = []

    def begin() -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        graphs.append(graph)

    def cut(site: str, activation: Tensor) -> Tensor:
        kept = activation.clone()
        graphs[-1].capture_end()
        cuts.append((site, kept))
        begin()
        return kept

    begin()
    try:
        output = function(cut)
    finally:
        graphs[-1].capture_end()
    return CudaRecording(graphs, cuts, output)


def _copy(site: str, activation: Tensor) -> Tensor:
    del site
    return activation.clone()


def _event() -> Any:
    """A thread that waits for a blocking event sleeps. One that spins would look as if it computed, to those who watch
    the process for a device that hangs."""
    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]


class CudaPass:
    """A pass that was queued; see :class:`underpaint_server.backends.protocol.Unfinished`."""

    def __init__(self, device: torch.device) -> None:
        """Its beginning: what is queued from now on belongs to it."""
        self._stream = torch.cuda.current_stream(device)
        self.begin, self.end = (_event(), _event())
        self.begin.record(self._stream)

    def queued(self) -> None:
        """All of it has been queued."""
        self.end.record(self._stream)

    def wait(self) -> float:
        """See :class:`Unfinished`."""
        try:
            self.end.synchronize()
            return float(self.begin.elapsed_time(self.end)) / 1e3
        except torch.AcceleratorError as error:
            raise DeviceLost(str(error)) from error
