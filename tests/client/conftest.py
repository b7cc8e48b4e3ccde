"""A real gRPC server on a real socket that keeps the contract without a model, and follows a test's script."""

import asyncio
import hashlib
import io
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from PIL import Image
from underpaint import AsyncClient, Client
from underpaint.v1 import (
    edit_service_pb2,
    edit_service_pb2_grpc,
    inversion_service_pb2,
    inversion_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    types_pb2,
)

_SERVICES = (
    (edit_service_pb2, edit_service_pb2_grpc, "EditService"),
    (inversion_service_pb2, inversion_service_pb2_grpc, "InversionService"),
    (model_service_pb2, model_service_pb2_grpc, "ModelService"),
)
Behaviour = Callable[[Any, grpc.ServicerContext], Any]


def png(color: str = "red", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


class Refusal:
    """Ends a call the way the server does: ``google.rpc.Status`` in the trailer."""

    def __init__(self, code: grpc.StatusCode, reason: str = "", message: str = "no", *details: Message, **facts: Any):
        self._code, self._message = code, message
        info = error_details_pb2.ErrorInfo(reason=reason, domain="underpaint", metadata=facts)
        self._details = (*((info,) if reason else ()), *details)

    def __call__(self, request: Any, context: grpc.ServicerContext) -> Any:
        status = status_pb2.Status(code=self._code.value[0], message=self._message)
        for detail in self._details:
            status.details.add().Pack(detail)
        trailers: list[tuple[str, Any]] = []
        if self._details:
            trailers.append(("grpc-status-details-bin", status.SerializeToString()))
        context.set_trailing_metadata(tuple(trailers))
        context.abort(self._code, self._message)


class ScriptedServer:
    """Answers every RPC by the contract, or by the next behaviour in the RPC's script."""

    def __init__(self, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.times: list[float] = []
        self.metadata: list[dict[str, Any]] = []
        self.time_remaining: list[float] = []
        self.inversions: dict[str, Any] = {}
        self._made: set[str] = set()
        self.scripts: dict[str, deque[Behaviour]] = {}
        self.models = [_model("models/mini"), _model("models/other")]
        self.latents = bytes(range(256)) * 10
        self.cancelled = threading.Event()
        self.tells_parameters = True
        """Whether resolved requests have the parameters of their inversion."""
        self._server = grpc.server(
            futures.ThreadPoolExecutor(8),
            options=[("grpc.max_receive_message_length", 24 << 20), ("grpc.max_send_message_length", 32 << 20)],
        )
        for messages, stubs, name in _SERVICES:
            methods = [method.name for method in messages.DESCRIPTOR.services_by_name[name].methods]
            servicer = type(name, (), {method: self._method(method) for method in methods})()
            getattr(stubs, f"add_{name}Servicer_to_server")(servicer, self._server)
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        self.target = address if address.startswith("unix") else f"127.0.0.1:{port}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()

    def script(self, rpc: str, *behaviours: Behaviour) -> None:
        """The next calls of ``rpc`` go by these, one each; the contract comes after."""
        self.scripts.setdefault(rpc, deque()).extend(behaviours)

    def named(self, rpc: str) -> list[Any]:
        """Requests of one RPC, in the order they came."""
        return [request for name, request in self.requests if name == rpc]

    def _method(self, rpc: str) -> Callable[..., Any]:
        def method(_: Any, request: Any, context: grpc.ServicerContext) -> Any:
            self.requests.append((rpc, request))
            self.times.append(time.monotonic())
            self.metadata.append(dict(context.invocation_metadata()))
            self.time_remaining.append(context.time_remaining())
            scripted = self.scripts.get(rpc)
            behave = scripted.popleft() if scripted else getattr(self, re.sub(r"(?=[A-Z])", "_", rpc).lower())
            return behave(request, context)

        return method

    # --- the contract ---

    def _invert(self, request: Any, context: Any) -> Any:
        inversion = self._inverted(request.image, request.parameters, request.model)
        if request.verify:
            inversion.reconstruction_psnr_db, inversion.reconstruction_max_abs_error = 41.5, 1.25e-14
        usage = types_pb2.Usage(network_evaluations=20, mean_batch_size=1)
        return inversion_service_pb2.InvertResponse(inversion=inversion, usage=usage)

    def _stream_invert(self, request: Any, context: Any) -> Iterator[Any]:
        for step in (1, 2):
            progress = types_pb2.Progress(phase=types_pb2.PHASE_INVERTING, step=step, total_steps=2, fraction=step / 2)
            yield inversion_service_pb2.StreamInvertResponse(progress=progress)
        yield inversion_service_pb2.StreamInvertResponse(result=self._invert(request.invert, context))

    def _edit(self, request: Any, context: Any) -> Any:
        resolved = self._resolve(request, context)
        color = hashlib.sha256(resolved.SerializeToString(deterministic=True)).hexdigest()[:6]
        made = edit_service_pb2.EditResponse(
            image=types_pb2.Image(content=png(f"#{color}"), media_type="image/png"),
            resolved=resolved,
            inversion=resolved.inversion,
            usage=_usage(),
        )
        if request.WhichOneof("source") == "image":
            made.fitting.CopyFrom(_fitting())
        if request.WhichOneof("method") == "diffedit":
            made.mask.content = png("white")
            made.notices.add(reason="MASK_FULL", message="everything changes")
        return made

    def _stream_edit(self, request: Any, context: Any) -> Iterator[Any]:
        result = self._edit(request.edit, context)
        event = edit_service_pb2.StreamEditResponse
        yield event(accepted=edit_service_pb2.Accepted(request_id=request.edit.request_id, queue_position=3))
        for step in (1, 2, 3, 4):
            progress = types_pb2.Progress(phase=types_pb2.PHASE_DENOISING, step=step, total_steps=4, fraction=step / 4)
            progress.eta.FromMilliseconds(500 * (4 - step))
            yield event(progress=progress)
            if request.preview_every and step % request.preview_every == 0:
                yield event(preview=edit_service_pb2.Preview(image=types_pb2.Image(content=png("grey")), step=step))
        yield event(result=result)

    def _compute_mask(self, request: Any, context: Any) -> Any:
        difference = types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[2, 3], data=_FLOATS)
        return edit_service_pb2.ComputeMaskResponse(
            mask=types_pb2.Image(content=png("white")),
            difference=difference,
            coverage=0.25,
            resolved=self._resolve(request.edit, context),
            usage=_usage(),
        )

    def _get_inversion(self, request: Any, context: Any) -> Any:
        return inversion_service_pb2.GetInversionResponse(inversion=self._stored(request.name, context))

    def _list_inversions(self, request: Any, context: Any) -> Any:
        start, size = int(request.page_token or 0), request.page_size or 50
        names = list(self.inversions)[::-1]
        more = str(start + size) if start + size < len(names) else ""
        page = [self.inversions[name] for name in names[start : start + size]]
        return inversion_service_pb2.ListInversionsResponse(inversions=page, next_page_token=more)

    def _delete_inversion(self, request: Any, context: Any) -> Any:
        if not request.allow_missing:
            self._stored(request.name, context)
        self.inversions.pop(request.name, None)
        return inversion_service_pb2.DeleteInversionResponse()

    def _export_inversion(self, request: Any, context: Any) -> Iterator[Any]:
        self._stored(request.name, context)
        yield from export(self.latents, crc32c=0x42ECEDF2)

    def _list_models(self, request: Any, context: Any) -> Any:
        index = int(request.page_token or 0)
        more = str(index + 1) if index + 1 < len(self.models) else ""
        return model_service_pb2.ListModelsResponse(models=[self.models[index]], next_page_token=more)

    def _get_model(self, request: Any, context: Any) -> Any:
        for model in self.models:
            if model.name == request.name:
                return model_service_pb2.GetModelResponse(model=model)
        return Refusal(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "there are mini, other")(request, context)

    def _inverted(self, image: Any, parameters: Any, model: str) -> Any:
        made = inversion_service_pb2.Inversion(model=model or "models/mini", width=64, height=64, size_bytes=4096)
        made.parameters.CopyFrom(parameters)
        made.parameters.steps = parameters.steps or 10
        for name, default in (("strength", 0.8), ("guidance_scale", 3.0)):
            if not parameters.HasField(name):
                setattr(made.parameters, name, default)
        if made.parameters.WhichOneof("method") == "edict" and not parameters.edict.HasField("mixing_coefficient"):
            made.parameters.edict.mixing_coefficient = 0.93
        facts = image.content + made.parameters.SerializeToString(deterministic=True) + made.model.encode()
        made.name = f"inversions/{hashlib.sha256(facts).hexdigest()}"
        made.fitting.CopyFrom(_fitting())
        made.create_time.FromJsonString("2026-01-02T03:04:05Z")
        made.expire_time.FromJsonString("2026-01-03T03:04:05Z")
        self.inversions[made.name] = made
        self._made.add(made.name)
        return made

    def _stored(self, name: str, context: Any) -> Any:
        if name not in self.inversions:
            Refusal(grpc.StatusCode.NOT_FOUND, "INVERSION_EXPIRED", "gone", resource_name=name)(None, context)
        return self.inversions[name]

    def _resolve(self, request: Any, context: Any) -> Any:
        made = self._stored(request.inversion, context) if request.WhichOneof("source") == "inversion" else None
        content = request.content_injection
        if content.inversion in self._made:  # tests may name contents that nobody has made
            self._stored(content.inversion, context)
        resolved = edit_service_pb2.EditRequest()
        resolved.CopyFrom(request)
        resolved.model = request.model or "models/mini"
        resolved.seed = request.seed if request.HasField("seed") else 1234
        if not request.HasField("guidance_scale"):
            resolved.guidance_scale = 7.5
        resolved.ClearField("request_id")
        if request.WhichOneof("source") == "image" and request.WhichOneof("method") != "sdedit":
            made = self._inverted(request.image, request.inversion_parameters, resolved.model)
        if made is not None:
            resolved.inversion = made.name
            resolved.ClearField("inversion_parameters")
            if self.tells_parameters:
                resolved.inversion_parameters.CopyFrom(made.parameters)
        if content.HasField("image"):
            resolved.content_injection.inversion = self._inverted(content.image, content_parameters(), "").name
        return resolved


_FLOATS = b"".join(bytes([0, 0, high, 0x3F]) for high in (0x00, 0x80)) * 3  # 0.5 and 1.0 in turns


def content_parameters() -> Any:
    """How the content of an edit is inverted."""
    return inversion_service_pb2.InversionParameters(ddim=inversion_service_pb2.DdimInversion(features=["mid"]))


def export(latents: bytes, crc32c: int, total: int | None = None) -> Iterator[Any]:
    """An export in chunks of 1000 bytes, sealed as told."""
    chunks = [latents[start : start + 1000] for start in range(0, len(latents), 1000)]
    for index, chunk in enumerate(chunks):
        response = inversion_service_pb2.ExportInversionResponse(chunk=chunk)
        if index == 0:
            response.total_bytes = len(latents) if total is None else total
        if index == len(chunks) - 1:
            response.crc32c = crc32c
        yield response


def _usage() -> Any:
    usage = types_pb2.Usage(
        network_evaluations=40, mean_batch_size=1.5, inversion_cache_hit=True, reused_evaluations=16
    )
    usage.queue_time.FromMilliseconds(250)
    usage.compute_time.FromMilliseconds(1500)
    return usage


def _fitting() -> Any:
    return types_pb2.Fitting(
        fit=types_pb2.FIT_CROP, source_width=200, source_height=100, width=64, height=64, source_left=50,
        source_box_width=100, source_box_height=100, box_width=64, box_height=64,
    )  # fmt: skip


def _model(name: str) -> Any:
    limits = model_service_pb2.Limits(
        max_image_bytes=5000, max_image_pixels=1 << 24, max_steps=200, max_batch_size=16, max_prompt_chars=2000,
        size_multiple=8, max_mask_samples=64,
    )  # fmt: skip
    return model_service_pb2.Model(
        name=name, state=model_service_pb2.MODEL_STATE_READY, digest="sha256:0", methods=["edict", "diffedit"],
        limits=limits, width=64, height=64, default_steps=20, backend="torch", batch_class=4,
        exact_batching=model_service_pb2.EXACT_BATCHING_FIXED_SIZE,
    )  # fmt: skip


class Driver:
    """Calls a client's methods by name, whichever kind it is, and waits for the outcome."""

    def __init__(self, kind: str, target: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self.client: Any = (Client if kind == "sync" else AsyncClient)(target, **{"timeout": 60.0, **options})
        self.is_async = kind == "async"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            outcome = getattr(self.client, name)(*arguments, **options)
            return self._runner.run(outcome) if asyncio.iscoroutine(outcome) else outcome

        return call

    def collect(self, name: str, **options: Any) -> list[Any]:
        """All that an iterating method gives."""
        outcome = getattr(self.client, name)(**options)
        if not self.is_async:
            return list(outcome)

        async def gather() -> list[Any]:
            return [each async for each in outcome]

        return self._runner.run(gather())

    def shut(self) -> None:
        self.close()
        self._runner.close()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    yield scripted
    scripted.stop()


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def connect(kind: str) -> Iterator[Callable[..., Driver]]:
    opened: list[Driver] = []

    def connect_to(target: str, **options: Any) -> Driver:
        opened.append(Driver(kind, target, **options))
        return opened[-1]

    yield connect_to
    for driver in opened:
        driver.shut()


@pytest.fixture
def client(connect: Callable[..., Driver], server: ScriptedServer) -> Driver:
    """Every test that uses it runs with the synchronous and with the asynchronous client."""
    return connect(server.target)


@pytest.fixture
def refusal() -> type[Refusal]:
    return Refusal


@pytest.fixture
def photo() -> bytes:
    return png()


@pytest.fixture
def exported() -> Callable[..., Iterator[Any]]:
    return export
