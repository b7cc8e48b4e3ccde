"""The standard gRPC health service, for probes and load balancers."""

# ruff: noqa: N802 (methods and their arguments are the contract's)

import asyncio
from collections.abc import AsyncIterator
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from underpaint_server.dispatch.supervisor import EngineState
from underpaint_server.rpc.calls.messages import Context
from underpaint_server.rpc.context import ServerContext
from underpaint_server.telemetry import report_unexpected

_UPDATE_EVERY_S: Final = 0.5

STARTUP: Final = "startup"
READINESS: Final = "readiness"
LIVENESS: Final = "liveness"
_READY_NAMES: Final = (
    "",
    READINESS,
    "underpaint.v1.EditService",
    "underpaint.v1.InversionService",
    "underpaint.v1.DirectionService",
)


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the library has no types
    """Answers with the statuses of :class:`Health`.

    The library's own service holds a lock while it sends to a watcher, so that one who reads nothing would stop every
    change of the status.
    """

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._changed = asyncio.Event()

    def set(self, name: str, serving: bool) -> None:
        """Set the status of a name, and tell those who watch."""
        if self._serving.get(name) is not serving:
            self._serving[name] = serving
            self._changed.set()
            self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """The status of one name."""
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service of this name; List has those that there are")
        return self._answer(request.service)

    async def List(self, _: "health_pb2.HealthListRequest", __: Context) -> "health_pb2.HealthListResponse":
        """The statuses of all names. Older versions of the library have no such RPC."""
        return health_pb2.HealthListResponse(statuses={name: self._answer(name) for name in self._serving})

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, _: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status of one name, and each other one that it gets later."""
        last = None
        while True:
            changed = self._changed
            if (answer := self._answer(request.service)) != last:
                yield answer
                last = answer
            await changed.wait()

    def _answer(self, name: str) -> health_pb2.HealthCheckResponse:
        statuses = {
            True: health_pb2.HealthCheckResponse.SERVING,
            False: health_pb2.HealthCheckResponse.NOT_SERVING,
            None: health_pb2.HealthCheckResponse.SERVICE_UNKNOWN,
        }
        return health_pb2.HealthCheckResponse(status=statuses[self._serving.get(name)])


class Health:
    """Keeps the statuses of :class:`HealthService` up to date.

    ``startup`` is SERVING once a model has loaded; ``readiness``, ``""`` and the names of the services are SERVING
    while new work is accepted for at least one model; ``liveness`` is SERVING unless the engine process stalls, cannot
    be started, or failed too often in a row.
    """

    def __init__(self, server: ServerContext) -> None:
        self._server = server
        self.service = HealthService()

    async def watch(self) -> None:
        """Update the statuses every half second, until cancelled."""
        while True:
            try:
                self.update()
            except Exception as error:
                report_unexpected("the server's health cannot be determined", error)
                self.service.set(LIVENESS, False)
            await asyncio.sleep(_UPDATE_EVERY_S)

    def update(self) -> None:
        """Update the statuses now."""
        engine = self._server.engine
        ready = engine.state is EngineState.READY and not self._server.draining
        for name in _READY_NAMES:
            self.service.set(name, ready)
        self.service.set(STARTUP, bool(engine.models))
        self.service.set(LIVENESS, not engine.stalled and engine.state is not EngineState.FAILED)
