"""The standard gRPC health service, for probes and load balancers."""

import asyncio
from typing import Final

from grpc_health.v1 import health, health_pb2

from underpaint_server.dispatch.supervisor import EngineState
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


class Health:
    """Keeps the standard servicer's statuses up to date.

    ``startup`` is SERVING once a model has loaded; ``readiness``, ``""`` and the names of the services are SERVING
    while new work is accepted for at least one model; ``liveness`` is SERVING unless the engine process stalls, cannot
    be started, or failed too often in a row.
    """

    def __init__(self, server: ServerContext) -> None:
        self._server = server
        self.servicer = health.aio.HealthServicer()

    async def watch(self) -> None:
        """Update the statuses every half second, until cancelled."""
        while True:
            try:
                await self.update()
            except Exception as error:
                report_unexpected("the server's health cannot be determined", error)
                await self._set(LIVENESS, False)
            await asyncio.sleep(_UPDATE_EVERY_S)

    async def update(self) -> None:
        """Update the statuses now."""
        engine = self._server.engine
        ready = engine.state is EngineState.READY and not self._server.draining
        for name in _READY_NAMES:
            await self._set(name, ready)
        await self._set(STARTUP, bool(engine.models))
        await self._set(LIVENESS, not engine.stalled and engine.state is not EngineState.FAILED)

    async def _set(self, name: str, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self.servicer.set(name, status)
