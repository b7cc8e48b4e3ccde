"""Health by the standard service, for probes and balancers; it never enters the queue."""

import asyncio
from typing import Final

from grpc_health.v1 import health, health_pb2

from underpaint_server.dispatch.supervisor import EngineState
from underpaint_server.rpc.context import ServerContext

_LOOK_EVERY_S: Final = 0.5

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
    """Keeps the standard servicer up to date.

    ``startup`` serves once the models were loaded; ``readiness``, ``""`` and the services' own names serve while new
    work is taken; ``liveness`` serves unless the engine stands still or has failed for good.
    """

    def __init__(self, server: ServerContext) -> None:
        self._server = server
        self.servicer = health.aio.HealthServicer()

    async def watch(self) -> None:
        """Look at the engine every half second, for ever."""
        while True:
            await self.update()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def update(self) -> None:
        """Look now."""
        engine = self._server.engine
        ready = engine.state is EngineState.READY and not self._server.draining
        for name in _READY_NAMES:
            await self._set(name, ready)
        await self._set(STARTUP, bool(engine.models))
        await self._set(LIVENESS, not engine.stalled and engine.state is not EngineState.FAILED)

    async def _set(self, name: str, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self.servicer.set(name, status)
