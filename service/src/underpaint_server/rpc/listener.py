"""Keeps a gRPC server on its port."""

import asyncio
from collections.abc import Callable
from typing import Final

import grpc
import structlog

_log = structlog.get_logger(__name__)

_WATCH_S: Final = 60.0
_RETRY_S: Final = 0.1


class Listener:
    """The gRPC server, and another one on the same port whenever the library ends it.

    The library ends its server, with all calls in it, when it cannot decode the path of a request as UTF-8, before any
    code of ours sees that request.
    """

    def __init__(self, build: Callable[[], grpc.aio.Server]) -> None:
        self._build = build
        self._address = ""
        self.server = build()
        """The present server; it has no port yet when this object is made."""

    async def start(self, address: str) -> None:
        """Start the server, whose port has been added; ``address`` is where it listens."""
        self._address = address
        await self.server.start()

    async def watch(self) -> None:
        """Start another server when the present one ends by itself; returns when :meth:`stop` has ended it."""
        while True:
            try:
                # With a timeout, because without one a cancellation here would break the library's own shutdown.
                while await self.server.wait_for_termination(_WATCH_S):
                    pass
            except Exception as error:
                _log.error("the gRPC library ended its server; starting another", error=str(error))
                await self._restart()
            else:
                return

    async def stop(self, grace_s: float) -> None:
        """Accept no more calls; cancel those that have not ended in ``grace_s`` seconds."""
        await self.server.stop(grace_s)

    async def _restart(self) -> None:
        while True:
            server = self._build()
            try:
                server.add_insecure_port(self._address)
            except RuntimeError as error:  # the port is not free yet
                _log.warning("cannot listen again yet", address=self._address, error=str(error))
                await asyncio.sleep(_RETRY_S)
            else:
                await server.start()
                self.server = server
                _log.info("listening again", address=self._address)
                return
