"""Runtime of ONNX Runtime: on a CPU, and on a CUDA device with the package onnxruntime-gpu."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime as ort
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from underpaint_server.backends.compiled import CompiledRuntime, Session
from underpaint_server.backends.exactness import Survey
from underpaint_server.backends.export import Site, export, flag_name, value_name
from underpaint_server.backends.model import ModelBackend, device_of, load_model, log_loading
from underpaint_server.backends.runtime import Unavailable
from underpaint_server.cores import usable_cores
from underpaint_server.models.families import Family
from underpaint_server.models.graphs import UNET
from underpaint_server.settings import Settings

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Kind of device -> what computes on it."""
MAX_SHAPES = 64
"""Most shapes of latents whose unchanged flags and values are kept."""
_TYPES = {torch.float32: "float32", torch.int64: "int64", torch.bool: "bool"}


def load(location: str, model_id: str, settings: Settings, survey: Survey | None) -> ModelBackend:
    """See :class:`underpaint_server.backends.Loader`. The networks are computed in float32."""
    if settings.dtype not in ("auto", "float32"):
        raise Unavailable("ONNX Runtime computes in float32 here: use --dtype float32, or --backend openvino or torch")

    def make(model: Family, settings: Settings) -> CompiledRuntime:
        return _make(model, model_id, settings)

    return load_model(location, model_id, settings, survey, torch.float32, make)


def _make(model: Family, model_id: str, settings: Settings) -> CompiledRuntime:
    device = device_of(settings)
    if PROVIDERS[device.type] not in ort.get_available_providers():
        raise Unavailable(
            f"this ONNX Runtime has no {PROVIDERS[device.type]}: install onnxruntime-gpu in place of onnxruntime, or "
            "use --device cpu"
        )
    exported = export(model, settings, lambda note: log_loading(model_id, note))
    threads = settings.threads or usable_cores()
    sessions: dict[str, Session] = {}
    for graph in model.graphs:
        sites = exported.sites if graph == UNET else {}
        latents = model.graphs[graph].inputs[0].name
        sessions[graph] = OnnxSession(exported.file(graph), device, latents, sites, threads)
    return CompiledRuntime("onnxruntime", ort.__version__, "float32", model, exported, sessions)


class OnnxSession:
    """One graph; see :class:`underpaint_server.backends.compiled.Session`. All threads compute one chunk.

    ``latents`` names the input that sizes are read from, ``sites`` are its feature sites. Raises
    :class:`Unavailable` if the library does not compute on ``device``.
    """

    workers = 1

    def __init__(self, file: Path, device: torch.device, latents: str, sites: Mapping[str, Site], threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "0"
        )  # cores are shared with other processes
        provider = PROVIDERS[device.type]
        self._device = device
        self._latents = latents
        self._sites = sites
        self._session = ort.InferenceSession(file, options, providers=[(provider, self._provider_options())])
        found = self._session.get_providers()
        if found[0] != provider:  # it falls back to the CPU without an error
            raise Unavailable(f"ONNX Runtime computes with {found[0]} in place of {provider}; its log says why")
        self._zeros: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def run(self, inputs: Mapping[str, Tensor], chunks: Sequence[slice], outputs: Sequence[str]) -> dict[str, Tensor]:
        """See :class:`Session`."""
        parts = [self._compute({name: v[chunk] for name, v in inputs.items()}, outputs) for chunk in chunks]
        return {name: torch.cat(values) for name, values in zip(outputs, zip(*parts, strict=True), strict=True)}

    def _compute(self, part: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        binding = self._session.io_binding()
        for name, values in (self._unchanged(part[self._latents].shape) | dict(part)).items():
            binding.bind_input(
                name, self._device.type, self._device.index or 0, _TYPES[values.dtype], values.shape, values.data_ptr()
            )
        for name in outputs:
            binding.bind_output(name, self._device.type, self._device.index or 0)
        self._session.run_with_iobinding(binding)
        return [from_dlpack(value) for value in binding.get_outputs()]

    def _unchanged(self, latents: torch.Size) -> dict[str, Tensor]:
        """Flags and values of the sites that change nothing, for latents of this shape."""
        if latents not in self._zeros:
            self._zeros = {latents: {}} if len(self._zeros) > MAX_SHAPES else self._zeros | {latents: {}}
            for name, site in self._sites.items():
                shape = site.shape(latents)
                flags = torch.zeros((shape[0], 1, 1, 1), dtype=torch.bool, device=self._device)
                self._zeros[latents] |= {flag_name(name): flags, value_name(name): flags.new_zeros(shape).float()}
        return self._zeros[latents]

    def _provider_options(self) -> dict[str, str]:
        """On CUDA, the library works in torch's stream, so that neither waits for the other on the host."""
        if self._device.type == "cpu":
            return {}
        stream = torch.cuda.current_stream(self._device).cuda_stream
        return {"device_id": str(self._device.index or 0), "user_compute_stream": str(stream), "use_tf32": "0"}
