"""What the end-to-end tests share: pictures, stock stubs, scrapes, and waiting."""

import asyncio
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import psutil
from google.longrunning import operations_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image, ImageDraw
from prometheus_client.parser import text_string_to_metric_families
from support.front import edit
from support.waiting import PATIENCE_S
from underpaint.v1 import (
    direction_service_pb2_grpc,
    edit_service_pb2,
    edit_service_pb2_grpc,
    inversion_service_pb2_grpc,
    model_service_pb2_grpc,
    types_pb2,
)
from underpaint_server.local_server import LocalServer


def disc(colour: tuple[int, int, int] = (205, 48, 48), size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A disc on white: what the embedded model knows well."""
    width, height = size
    picture = Image.new("RGB", (4 * width, 4 * height), (250, 250, 250))
    radius = 1.4 * min(size)
    box = (2 * width - radius, 2 * height - radius, 2 * width + radius, 2 * height + radius)
    ImageDraw.Draw(picture).ellipse(box, fill=colour)
    return picture.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Stubs:
    """Stock stubs on a channel without any service config: nothing is retried behind a test's back."""

    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        new = object.__setattr__
        new(self, "edits", edit_service_pb2_grpc.EditServiceStub(self.channel))
        new(self, "inversions", inversion_service_pb2_grpc.InversionServiceStub(self.channel))
        new(self, "models", model_service_pb2_grpc.ModelServiceStub(self.channel))
        new(self, "directions", direction_service_pb2_grpc.DirectionServiceStub(self.channel))
        new(self, "operations", operations_pb2_grpc.OperationsStub(self.channel))
        new(self, "health", health_pb2_grpc.HealthStub(self.channel))

    edits: Any = None
    inversions: Any = None
    models: Any = None
    directions: Any = None
    operations: Any = None
    health: Any = None

    async def serves(self, name: str) -> bool:
        """What the health service says of that name."""
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service=name))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@asynccontextmanager
async def stubs(server: LocalServer) -> AsyncIterator[Stubs]:
    """Stubs of a server."""
    async with grpc.aio.insecure_channel(server.target) as channel:
        yield Stubs(channel)


# --- work that lasts ----------------------------------------------------------------------------------------------

ENDLESS = 4000
"""Noise samples of a mask that keeps the closed-form network busy for longer than any test waits."""


def masking(samples: int = ENDLESS, **fields: Any) -> edit_service_pb2.EditRequest:
    """A DiffEdit whose mask takes so many noise samples: one group of rows, so it lasts and can be cut anywhere."""
    return edit("diffedit", diffedit={"samples": samples}, **fields)


@asynccontextmanager
async def running(stubs: Stubs, request: edit_service_pb2.EditRequest) -> AsyncIterator[Any]:
    """A StreamEdit that has a place in the engine; cancelled at the end, unless it has ended by then."""
    call = stubs.edits.StreamEdit(edit_service_pb2.StreamEditRequest(edit=request))
    try:
        await until(call, lambda event: event.progress.phase > types_pb2.PHASE_QUEUED)
        yield call
    finally:
        call.cancel()


async def together(server: LocalServer, calls: Iterable[Awaitable[Any]], inside: int) -> list[Any]:
    """The answers of calls of which ``inside`` are in the server before its engine computes anything for them."""
    engine = engine_of(server)
    engine.suspend()
    try:
        tasks = [asyncio.ensure_future(call) for call in calls]
        await eventually(lambda: _jobs(scrape(server)) >= inside)
    finally:
        engine.resume()
    return await asyncio.gather(*tasks)


async def queued(stubs: Stubs, request: edit_service_pb2.EditRequest) -> Any:
    """A StreamEdit that waits in the queue."""
    call = stubs.edits.StreamEdit(edit_service_pb2.StreamEditRequest(edit=request))
    await until(call, lambda event: event.WhichOneof("event") == "accepted" and event.accepted.queue_position > 0)
    return call


async def until(call: Any, wanted: Callable[[Any], bool]) -> Any:
    """The first message of a stream that is wanted."""
    async with asyncio.timeout(PATIENCE_S):
        while (message := await call.read()) is not grpc.aio.EOF:
            if wanted(message):
                return message
    raise AssertionError("the stream ended before what was waited for")


async def result(call: Any) -> edit_service_pb2.EditResponse:
    """The answer at the end of a StreamEdit."""
    message = await until(call, lambda event: event.WhichOneof("event") == "result")
    answer: edit_service_pb2.EditResponse = message.result
    return answer


# --- what an operator sees ----------------------------------------------------------------------------------------


class Samples:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        """Over all series of that name whose labels include these; 0 for none."""
        return float(sum(s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items()))

    def by(self, name: str, label: str) -> Mapping[str, float]:
        """The same for each value of a label."""
        values = {s.labels[label] for s in self._samples if s.name == name}
        return {value: self.sum(name, **{label: value}) for value in values}


def scrape(server: LocalServer) -> Samples:
    """The metrics page, read as Prometheus reads it."""
    with urllib.request.urlopen(server.metrics_url) as page:
        return Samples(page.read().decode())


async def idle(server: LocalServer) -> Samples:
    """A scrape, when nothing runs and nothing waits."""

    def look() -> Samples | None:
        now = scrape(server)
        return None if _jobs(now) else now

    found: Samples = await eventually(look)
    return found


def _jobs(now: Samples) -> float:
    return now.sum("underpaint_num_requests_running") + now.sum("underpaint_num_requests_waiting")


async def eventually(look: Callable[[], Any]) -> Any:
    """What ``look`` gives when it gives something at last."""
    end = time.monotonic() + PATIENCE_S
    while not (found := await asyncio.to_thread(look)):
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.02)
    return found


def batch_class_of(server: LocalServer) -> tuple[str, int | None]:
    """Number format of the server's only model, and the batch class that its passes are pinned to."""
    line = server.wait_for("model ready")
    return line["dtype"], line["batch_class"]


def engine_of(server: LocalServer) -> psutil.Process:
    """The engine process of a server without a spare one."""
    (engine,) = engines(psutil.Process(server.pid).children())
    return engine


def engines(children: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The engine process and its spare, in the order they were started: children that multiprocessing spawned and that
    are no resource tracker."""
    found = [child for child in children if child.is_running() and any("spawn_main" in word for word in _words(child))]
    return sorted(found, key=psutil.Process.create_time)


def _words(child: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return child.cmdline()
    return []


def gone(child: psutil.Process) -> None:
    """Wait until a process has ended; whether it was reaped is up to who adopted it."""
    end = time.monotonic() + PATIENCE_S
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, f"{child} does not end"
        time.sleep(0.02)
