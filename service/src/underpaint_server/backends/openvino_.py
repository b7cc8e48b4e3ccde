"""Runtime of OpenVINO, on a CPU. A chunk of each size is compiled for its own fixed shape, and each core computes one.

Fixed shapes are up to 1.5 times as fast as one compiled for all sizes.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from numpy.typing import NDArray
from openvino import properties
from openvino.properties import hint
from torch import Tensor

from underpaint_server.backends.compiled import CompiledRuntime, Session
from underpaint_server.backends.exactness import Survey
from underpaint_server.backends.export import Site, export, flag_name, value_name
from underpaint_server.backends.model import ModelBackend, is_heavy, load_model, log_loading
from underpaint_server.backends.runtime import Unavailable
from underpaint_server.cores import usable_cores
from underpaint_server.models.families import Family
from underpaint_server.models.graphs import UNET
from underpaint_server.settings import Settings

THREADS_OF_A_HEAVY_ROW = 8
"""Threads that share a row of a large network, see :func:`underpaint_server.backends.model.is_heavy`. A row of a small
one is computed by one thread, because threads that wait for each other cost more than they gain."""
MAX_COMPILED = 40
"""Most shapes of one graph that are kept compiled; the one that was not used longest is dropped for a new one."""

Array = NDArray[Any]


def load(location: str, model_id: str, settings: Settings, survey: Survey | None) -> ModelBackend:
    """See :class:`underpaint_server.backends.Loader`."""
    if settings.device == "cuda":
        raise Unavailable("OpenVINO computes on the CPU: use --device cpu, or --backend torch for the GPU")

    def make(model: Family, settings: Settings) -> CompiledRuntime:
        return _make(model, model_id, settings)

    return load_model(location, model_id, settings, survey, torch.float32, make)


def _make(model: Family, model_id: str, settings: Settings) -> CompiledRuntime:
    core = ov.Core()
    dtype = _dtype(core, settings)
    exported = export(model, settings, lambda note: log_loading(model_id, note))
    threads = settings.threads or usable_cores()
    workers = max(1, threads // THREADS_OF_A_HEAVY_ROW) if is_heavy(model) else min(threads, settings.max_batch_size)
    sessions: dict[str, Session] = {}
    for graph in model.graphs:
        precision, sites = (dtype, exported.sites) if graph == UNET else ("float32", {})
        file = exported.file(graph)
        sessions[graph] = OpenVinoSession(core, file, precision, sites, threads=threads, workers=workers)
    return CompiledRuntime("openvino", ov.__version__, dtype, model, exported, sessions)


def _dtype(core: ov.Core, settings: Settings) -> str:
    native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    match settings.dtype:
        case "auto":
            return "bfloat16" if native else "float32"
        case "float16":
            raise Unavailable("OpenVINO on a CPU computes in bfloat16 or float32: choose one of them with --dtype")
        case "bfloat16" if not native:
            raise Unavailable("this CPU does not compute in bfloat16: use --dtype float32")
        case dtype:
            return dtype


class OpenVinoSession:
    """One graph; see :class:`underpaint_server.backends.compiled.Session`.

    ``sites`` are its feature sites. ``threads`` are shared by ``workers``.
    """

    def __init__(
        self, core: ov.Core, file: Path, dtype: str, sites: Mapping[str, Site], *, threads: int, workers: int
    ) -> None:
        self.workers = workers
        self._core = core
        self._model = core.read_model(file)
        self._sites = sites
        self._optional = [name(site) for site in sites for name in (flag_name, value_name)]
        self._inputs = [each.get_any_name() for each in self._model.inputs]
        self._options = {
            hint.inference_precision(): {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16}[dtype],
            hint.execution_mode(): hint.ExecutionMode.PERFORMANCE,
            hint.enable_cpu_pinning(): False,  # chunks of two sizes would share a core, and so would two servers
            properties.num_streams(): workers,
            properties.inference_num_threads(): threads,
        }
        self._compiled: OrderedDict[tuple[tuple[int, ...], ...], _Compiled] = OrderedDict()

    def run(self, inputs: Mapping[str, Tensor], chunks: Sequence[slice], outputs: Sequence[str]) -> dict[str, Tensor]:
        """See :class:`Session`."""
        running: list[tuple[slice, _Request]] = []
        used: dict[_Compiled, int] = {}
        results: dict[str, Tensor] = {}
        try:
            for chunk in chunks:
                part = {name: values[chunk].numpy() for name, values in inputs.items()}
                compiled = self._for(part)
                number = used[compiled] = used.get(compiled, -1) + 1
                request = compiled.request(number)
                request.start(part)
                running.append((chunk, request))
            for chunk, request in running:
                request.wait()
                for name in outputs:
                    values = torch.from_numpy(request.output(name))
                    if name not in results:
                        results[name] = values.new_empty((chunks[-1].stop, *values.shape[1:]))
                    results[name][chunk] = values
        finally:
            for _, request in running:  # after an error others may be computed still, and would be busy the next time
                with suppress(RuntimeError):
                    request.wait()
        return results

    def _for(self, part: Mapping[str, Array]) -> "_Compiled":
        """The graph compiled for inputs of these shapes."""
        shapes = tuple(part[name].shape for name in self._names(part))
        compiled = self._compiled.pop(shapes, None) or self._compile(part)
        self._compiled[shapes] = compiled
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return compiled

    def _names(self, part: Mapping[str, Array]) -> list[str]:
        return [name for name in self._inputs if name in part and name not in self._optional]

    def _compile(self, part: Mapping[str, Array]) -> "_Compiled":
        model = self._model.clone()
        shapes: dict[str, list[int]] = {name: list(part[name].shape) for name in self._names(part)}
        for name, site in self._sites.items():
            values = site.shape(shapes[self._inputs[0]])
            shapes |= {flag_name(name): [values[0], 1, 1, 1], value_name(name): list(values)}
        model.reshape(shapes)
        return _Compiled(self._core.compile_model(model, "CPU", self._options), self._optional)


class _Compiled:
    """A graph for one shape, with as many requests as chunks of that shape were computed at one time."""

    def __init__(self, compiled: ov.CompiledModel, optional: Sequence[str]) -> None:
        self._compiled = compiled
        self._optional = optional
        self._requests: list[_Request] = []

    def request(self, number: int) -> "_Request":
        """The request of this number, made when it is first asked for."""
        while number >= len(self._requests):
            self._requests.append(_Request(self._compiled.create_infer_request(), self._optional))
        return self._requests[number]


class _Request:
    """Computes one chunk at a time. Optional inputs that it is not given are zeros."""

    def __init__(self, request: ov.InferRequest, optional: Sequence[str]) -> None:
        self._request = request
        self._zeros = {name: request.get_tensor(name) for name in optional}
        for tensor in self._zeros.values():
            tensor.data[...] = 0
        self._given: set[str] = set()
        self._inputs: Mapping[str, Array] = {}

    def start(self, inputs: Mapping[str, Array]) -> None:
        """Begin to compute. The arrays are read until :meth:`wait` returns."""
        self._inputs = inputs
        for name in self._given - set(inputs):
            self._request.set_tensor(name, self._zeros[name])
        self._given = set(inputs) & set(self._zeros)
        self._request.start_async(dict(inputs), share_inputs=True)

    def wait(self) -> None:
        """Return when the outputs are there."""
        self._request.wait()

    def output(self, name: str) -> Array:
        """An output, valid until the next :meth:`start`."""
        data: Array = self._request.get_tensor(name).data
        return data
