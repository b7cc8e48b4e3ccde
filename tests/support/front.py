"""The front process on a real socket, with a real store; only the engine answers by arithmetic instead of a network.

The engine's answers depend on everything a job says and on nothing else, as the real one's do.
"""

import asyncio
import hashlib
import io
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import grpc
import numpy as np
import pytest
from google.longrunning import operations_pb2_grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from PIL import Image
from underpaint.v1 import (
    direction_service_pb2_grpc,
    edit_service_pb2,
    edit_service_pb2_grpc,
    inversion_service_pb2_grpc,
    model_service_pb2_grpc,
    types_pb2,
)
from underpaint_server.decoder.process import Decoder
from underpaint_server.dispatch.job_handle import JobHandle
from underpaint_server.dispatch.queue import Dispatcher
from underpaint_server.dispatch.supervisor import EngineState
from underpaint_server.errors import Cancelled, UnderpaintError
from underpaint_server.jobs import (
    Edited,
    EditJob,
    Generated,
    Inversion,
    InversionOptions,
    Inverted,
    InvertJob,
    Job,
    Learned,
    LearnJob,
    LearnState,
    Masked,
    ModelInfo,
    Photo,
    Priority,
    Result,
    Stored,
    Usage,
)
from underpaint_server.methods import methods_for
from underpaint_server.methods.ddim.options import DdimInversion
from underpaint_server.methods.edict.options import EdictInversion
from underpaint_server.rpc.context import ServerContext
from underpaint_server.rpc.server import build_server
from underpaint_server.rpc.services.health import Health
from underpaint_server.settings import Settings
from underpaint_server.stores import Stores
from underpaint_server.telemetry import Metrics

MINI = ModelInfo(
    id="mini",
    digest="d" * 64,
    dtype="float32",
    methods=methods_for(reads_text=True),
    width=64,
    height=48,
    size_multiple=8,
    default_steps=20,
    prompt_tokens=77,
    batch_class=None,
    content_features="vae",
    gradients=True,
    fingerprint="f" * 64,
    feature_sites=("mid", "up_0", "up_1"),
)

SILENT = replace(MINI, methods=methods_for(reads_text=False), prompt_tokens=0)
"""A model that reads no text."""


class ArithmeticEngine:
    """Implements ``Dispatcher`` as far as the wire uses it; ``held`` jobs wait for ``finish``."""

    def __init__(self) -> None:
        self.state = EngineState.READY
        self.error = ""
        self.configured = ("mini", "other")
        other = replace(MINI, id="other", digest="e" * 64, content_features="", gradients=False)
        self.models: Mapping[str, ModelInfo] = {"mini": MINI, "other": other}
        self.errors: Mapping[str, str] = {}
        self.stalled = False
        self.held = False
        self.refusals: list[UnderpaintError] = []
        self.handles: list[JobHandle] = []
        self.deadlines: list[float | None] = []
        self.cancelled: list[JobHandle] = []
        self.submitted, self.extended = asyncio.Event(), asyncio.Event()
        self.models_ready: Mapping[str, bool] = dict.fromkeys(self.configured, True)
        self.num_running, self.queue_capacity, self.backlog_s, self.last_pass_at = 0, 4, 0.0, None
        self.max_batch_sizes: Mapping[tuple[str, str, str], int] = {}
        self._ids = itertools.count(1)

    async def wait_ready(self) -> None:
        assert self.state is EngineState.READY

    @property
    def jobs(self) -> list[Any]:
        return [handle.job for handle in self.handles]

    def num_waiting(self, priority: Priority) -> int:
        return 0

    def submit(self, job: Job, *, priority: Priority, deadline_s: float | None, preview_every: int = 0) -> JobHandle:
        if self.refusals:
            raise self.refusals.pop(0)
        now = time.monotonic()
        deadline = None if deadline_s is None else now + deadline_s
        handle = JobHandle(
            next(self._ids), job, priority, now, deadline, preview_every, self._cancel, lambda _: self.extended.set()
        )
        self.handles.append(handle)
        self.deadlines.append(deadline_s)
        self.submitted.set()
        if not self.held:
            asyncio.get_running_loop().call_soon(handle.end, answer(job, self.models[job.model]))
        return handle

    def finish(self, handle: JobHandle) -> None:
        handle.end(answer(handle.job, self.models[handle.job.model]))

    def _cancel(self, handle: JobHandle) -> None:
        self.cancelled.append(handle)
        handle.end(Cancelled("cancelled"))


def answer(job: Job, model: ModelInfo) -> Result:
    """What the job gives: noise seeded by all it says."""
    usage = Usage(queue_time_s=0.5, compute_time_s=1.25, network_evaluations=40, mean_batch_size=2.0)
    if isinstance(job, InvertJob):
        inverted = job.inversion or _invert(job.source, job.options, model)
        if job.verify:
            inverted = replace(inverted, reconstruction_psnr_db=40.0, reconstruction_max_abs_error=1e-13)
        return Inverted(inverted, usage)
    if isinstance(job, LearnJob):
        return Learned(*_learn(job), usage)
    made: Inversion | None = None
    if isinstance(job.source, Photo) and job.inversion is not None and isinstance(job, EditJob):
        made = _invert(job.source, job.inversion, model)
    inversion = job.source.inversion if isinstance(job.source, Stored) else made
    if inversion is not None:
        latents = inversion.arrays["source"].tobytes() + repr(inversion.options).encode()
    elif isinstance(job.source, Photo):
        latents = job.source.pixels.tobytes()
    else:
        latents = repr(job.source).encode()
    mask = getattr(job.method, "mask", getattr(job.method, "region", None))
    content_made: Inversion | None = None
    if isinstance(job, EditJob) and job.companion is not None:
        if isinstance(job.companion.source, Photo):
            content_made = _invert(job.companion.source, job.companion.inversion, model)
        content = job.companion.source.inversion if isinstance(job.companion.source, Stored) else content_made
        assert content is not None
        latents += content.arrays["h_mid"].tobytes()
    said = repr((job.method, job.target_prompt, job.negative_prompt, job.guidance_scale, job.seed)).encode()
    random = _random(said + latents + (b"" if mask is None else mask.tobytes()))
    height, width = _size(job)
    if not isinstance(job, EditJob):
        difference = random.random((height // 8, width // 8), np.float32)
        return Masked(np.full((height, width), 255, np.uint8), difference, 1.0, usage)
    pixels = random.integers(0, 256, (height, width, 3), np.uint8)
    return Edited(pixels, getattr(job.method, "mask", None), made, usage, companion=content_made)


def _invert(photo: Photo, options: InversionOptions, model: ModelInfo) -> Inversion:
    random = _random(photo.pixels.tobytes() + repr(options).encode())
    height, width = photo.pixels.shape[:2]
    source = photo.pixels.astype(np.float64)
    arrays: dict[str, Any] = {"source": source}
    if isinstance(options.method, EdictInversion):
        arrays |= {"x": random.standard_normal((4, 6, 8)), "y": random.standard_normal((4, 6, 8))}
    else:
        assert isinstance(options.method, DdimInversion)
        arrays |= {"trajectory": random.standard_normal((3, 4, 6, 8))}
        for site in options.method.features:
            arrays[f"h_{site}"] = random.standard_normal((2, 8, 3, 4)).astype(np.float16)
    return Inversion(model.id, model.digest, options, width, height, model.batch_class, arrays, model.fingerprint)


def _learn(job: LearnJob) -> tuple[LearnState, bool]:
    method = job.options.method
    steps = method.optimization_steps
    done = min(steps, (job.state.iteration if job.state else 0) + job.iterations)
    said = repr((job.options, [example.pixels.tobytes() if isinstance(example, Photo) else example
                               for example in job.examples])).encode()  # fmt: skip
    weights = tuple(_random(said).random(job.options.num_inference_steps).tolist())
    losses = tuple(1 / (k + 1) for k in range(done + (done == steps)))
    return LearnState(done, weights, weights, weights, losses, weights), done == steps


def _size(job: Any) -> tuple[int, int]:
    match job.source:
        case Photo(pixels=pixels):
            return pixels.shape[0], pixels.shape[1]
        case Stored(inversion=inversion):
            return inversion.height, inversion.width
        case Generated(width=width, height=height):
            return height, width
    raise AssertionError


def _random(said: bytes) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(said).digest()[:8]))


@dataclass
class Wire:
    """A started server, and stubs of a stock channel to it."""

    context: ServerContext
    engine: ArithmeticEngine
    metrics: Metrics
    health: Health
    server: grpc.aio.Server
    address: str
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.edits: Any = edit_service_pb2_grpc.EditServiceStub(self.channel)
        self.inversions: Any = inversion_service_pb2_grpc.InversionServiceStub(self.channel)
        self.models: Any = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.directions: Any = direction_service_pb2_grpc.DirectionServiceStub(self.channel)
        self.operations: Any = operations_pb2_grpc.OperationsStub(self.channel)

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


SETTINGS = Settings(
    max_image_bytes=60_000, max_image_pixels=512 * 512, max_prompt_chars=100, max_steps=50, max_mask_samples=16,
    rejoin_s=0.1,
)  # fmt: skip

DECODER = Decoder(1024 * 1024 * 1024)
"""One for all tests of a process; its host ends with them."""


@asynccontextmanager
async def started(settings: Settings = SETTINGS) -> AsyncIterator[Wire]:
    """The front process of these settings, without the process."""
    metrics = Metrics()
    stores = await Stores.open(settings, metrics)
    engine = ArithmeticEngine()
    metrics.watch_engine(engine)
    context = ServerContext.build(settings, cast(Dispatcher, engine), stores, metrics, DECODER)
    metrics.watch_calls(context.limits)
    metrics.watch_operations(context.manager)
    health = Health(context)
    health.update()
    server = build_server(context, health)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    context.manager.start()
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield Wire(context, engine, metrics, health, server, address, channel)
    await server.stop(0)
    await context.manager.close()
    await stores.close()
    context.threads.close()


# --- what tests say -----------------------------------------------------------------------------------------------


def picture(size: tuple[int, int] = (64, 48), seed: int = 0) -> Image.Image:
    """A smooth picture, different for every seed."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def photo(size: tuple[int, int] = (64, 48), seed: int = 0) -> types_pb2.Image:
    return types_pb2.Image(content=encoded(picture(size, seed)))


def edit(method: str = "edict", **fields: Any) -> edit_service_pb2.EditRequest:
    """A good request, with fields to spoil it."""
    request = edit_service_pb2.EditRequest(target_prompt="a corgi")
    if not {"image", "inversion", "generated"} & fields.keys():
        request.image.CopyFrom(photo())
    if method:
        getattr(request, method).SetInParent()
    request.MergeFrom(edit_service_pb2.EditRequest(**fields))
    return request


def merged(request: Any, **fields: Any) -> Any:
    request.MergeFrom(type(request)(**fields))
    return request


@dataclass(frozen=True)
class Refusal:
    """A gRPC error, read as any client can read it."""

    code: grpc.StatusCode
    message: str
    details: dict[str, Any]
    trailers: dict[str, Any]

    @property
    def reason(self) -> str:
        info = self.details["ErrorInfo"]
        assert info.domain == "underpaint"
        return str(info.reason)

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.details["ErrorInfo"].metadata)

    @property
    def paths(self) -> list[str]:
        return [violation.field for violation in self.details["BadRequest"].field_violations]


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    trailers = dict(iter(error.trailing_metadata() or ()))  # as pairs: keys() is wrong in older grpcio
    status = status_pb2.Status.FromString(cast(bytes, trailers["grpc-status-details-bin"]))
    assert status.code == error.code().value[0]
    details: dict[str, Message] = {}
    for packed in status.details:
        kind = packed.TypeName().rpartition(".")[2]
        assert kind not in details, "each detail at most once"
        details[kind] = getattr(error_details_pb2, kind).FromString(packed.value)
    return Refusal(error.code(), error.details() or "", details, trailers)


async def overdue(wire: Wire, call: Callable[[float], Any]) -> grpc.aio.AioRpcError:
    """Make a call to a held engine, and give its error once its deadline has passed with its job in the engine.

    ``call`` takes the deadline in seconds. On a busy machine a short one passes before the call has come so far; then a
    longer one is tried.
    """
    for timeout_s in (0.1, 1.0, 10.0, 100.0):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(timeout_s)
        if wire.engine.handles:
            break
    return caught.value


async def refused(call: Any) -> Refusal:
    """The refusal of a unary call, or of a stream before its first message."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if hasattr(call, "read") else call)
    return refusal(caught.value)
