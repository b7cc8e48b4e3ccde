"""DirectionService: in the contract, not in this server."""

# ruff: noqa: N802, ARG002 (methods and their arguments are the contract's)

from collections.abc import AsyncIterator
from typing import Never

from underpaint.v1 import direction_service_pb2 as messages
from underpaint.v1 import direction_service_pb2_grpc

from underpaint_server.errors import MethodDisabled
from underpaint_server.rpc.interceptors import Context


class DirectionService(direction_service_pb2_grpc.DirectionServiceServicer):
    """Refuses every call with MethodDisabled, so that a caller learns why, and not only that."""

    async def LearnDirection(
        self, request: messages.LearnDirectionRequest, context: Context
    ) -> messages.LearnDirectionResponse:
        """Not offered."""
        _refuse()

    async def GetDirection(
        self, request: messages.GetDirectionRequest, context: Context
    ) -> messages.GetDirectionResponse:
        """Not offered."""
        _refuse()

    async def ListDirections(
        self, request: messages.ListDirectionsRequest, context: Context
    ) -> messages.ListDirectionsResponse:
        """Not offered."""
        _refuse()

    async def DeleteDirection(
        self, request: messages.DeleteDirectionRequest, context: Context
    ) -> messages.DeleteDirectionResponse:
        """Not offered."""
        _refuse()

    def ExportDirection(
        self, request: messages.ExportDirectionRequest, context: Context
    ) -> AsyncIterator[messages.ExportDirectionResponse]:
        """Not offered."""
        _refuse()

    async def ImportDirection(
        self, request_iterator: AsyncIterator[messages.ImportDirectionRequest], context: Context
    ) -> messages.ImportDirectionResponse:
        """Not offered."""
        _refuse()


def _refuse() -> Never:
    raise MethodDisabled("this server has no directions: learned edits are not offered")
