"""The gRPC server with all its services."""

from typing import Final

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from underpaint.v1 import (
    direction_service_pb2,
    direction_service_pb2_grpc,
    edit_service_pb2,
    edit_service_pb2_grpc,
    inversion_service_pb2,
    inversion_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)

from underpaint_server.methods import METHODS
from underpaint_server.methods.message import message_of
from underpaint_server.rpc.calls.interceptor import CallInterceptor
from underpaint_server.rpc.calls.messages import TRANSPORT_FACTOR
from underpaint_server.rpc.context import ServerContext
from underpaint_server.rpc.services.directions import DirectionService
from underpaint_server.rpc.services.edits import EditService
from underpaint_server.rpc.services.health import Health
from underpaint_server.rpc.services.inversions import InversionService
from underpaint_server.rpc.services.models import ModelService
from underpaint_server.rpc.services.operations import OperationsService
from underpaint_server.settings import Settings

_MINUTE_MS: Final = 60_000
_HANDSHAKE_MS: Final = 20_000
"""Time within which a new connection must begin to speak HTTP/2."""
_IDLE_MS: Final = 5 * _MINUTE_MS
"""Time without a call after which a connection is closed; the client's next call opens another."""

_DESCRIPTORS: Final = (
    edit_service_pb2.DESCRIPTOR,
    inversion_service_pb2.DESCRIPTOR,
    model_service_pb2.DESCRIPTOR,
    direction_service_pb2.DESCRIPTOR,
    operations_pb2.DESCRIPTOR,
    health_pb2.DESCRIPTOR,
)


def build_server(context: ServerContext, health: Health) -> grpc.aio.Server:
    """The server with all services; add a port and start it."""
    for name in METHODS:
        message_of(name)  # loads its file; at the first call there might be no free descriptor to open it
    max_message_bytes = context.settings.max_message_bytes
    interceptor = CallInterceptor(context.metrics, context.engine.configured[0], max_message_bytes, context.limits)
    server = grpc.aio.server(interceptors=[interceptor], options=_options(context.settings))
    edit_service_pb2_grpc.add_EditServiceServicer_to_server(EditService(context), server)
    inversion_service_pb2_grpc.add_InversionServiceServicer_to_server(InversionService(context), server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(context), server)
    direction_service_pb2_grpc.add_DirectionServiceServicer_to_server(DirectionService(context), server)
    operations_pb2_grpc.add_OperationsServicer_to_server(OperationsService(context), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.service, server)
    names = [service.full_name for file in _DESCRIPTORS for service in file.services_by_name.values()]
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
    return server


def _options(settings: Settings) -> list[tuple[str, int]]:
    max_message_bytes = TRANSPORT_FACTOR * settings.max_message_bytes
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # Clients may ping every ten seconds, also between calls; by default gRPC would close their connections for it.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_time_ms", _MINUTE_MS),
        ("grpc.keepalive_timeout_ms", 20_000),
        # The library resets or closes what is beyond these.
        ("grpc.max_concurrent_streams", settings.max_streams),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        # A client that balances over DNS resolves only when a connection ends; otherwise it finds no new replicas. The
        # calls of such a connection go on without a time limit (grpc.max_connection_age_grace_ms is not set).
        ("grpc.max_connection_age_ms", 5 * _MINUTE_MS),
        # Otherwise two servers could listen on one port and split the calls at random; the second must fail to start.
        ("grpc.so_reuseport", 0),
    ]
