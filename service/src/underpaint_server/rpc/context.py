"""The state that all services of the gRPC server share."""

from dataclasses import dataclass
from typing import Any

from underpaint_server.decoder.process import Decoder
from underpaint_server.dispatch.queue import Dispatcher
from underpaint_server.errors import ModelLoading, ModelNotFound, ModelNotReady
from underpaint_server.jobs import ModelInfo
from underpaint_server.operations.manager import OperationManager
from underpaint_server.rpc.calls.idempotency import Idempotency
from underpaint_server.rpc.calls.limits import CallLimits
from underpaint_server.rpc.calls.singleflight import SingleFlight
from underpaint_server.rpc.responses.operation import OperationEncoder
from underpaint_server.rpc.threads import Threads
from underpaint_server.settings import Settings
from underpaint_server.stores import Stores
from underpaint_server.telemetry import Metrics
from underpaint_server.wire.headers import ImageLimits
from underpaint_server.wire.names import model_id, model_name

_LOADING_RETRY_S = 2.0


@dataclass(slots=True)
class ServerContext:
    """The parts of the front process, used on its event loop only."""

    settings: Settings
    engine: Dispatcher
    stores: Stores
    manager: OperationManager
    metrics: Metrics
    threads: Threads
    decoder: Decoder
    limits: CallLimits
    idempotency: Idempotency
    inverting: SingleFlight[Any]
    """Inversions that InversionService is computing, by name and whether they are verified."""
    draining: bool = False
    """Set once, when the server begins to shut down."""

    @classmethod
    def build(
        cls, settings: Settings, engine: Dispatcher, stores: Stores, metrics: Metrics, decoder: Decoder
    ) -> "ServerContext":
        """Create the remaining parts from the settings."""
        return cls(
            settings=settings,
            engine=engine,
            stores=stores,
            manager=OperationManager(settings, engine, stores.operations, stores.directions, OperationEncoder()),
            metrics=metrics,
            threads=Threads(settings.max_running + settings.queue_capacity),
            decoder=decoder,
            limits=CallLimits(
                max_calls=settings.max_calls,
                max_slow=settings.max_slow_requests,
                arrival_s=settings.request_arrival_s,
                max_bytes=settings.request_bytes,
            ),
            idempotency=Idempotency(
                ttl_s=settings.replay_ttl_s,
                max_bytes=settings.replay_bytes,
                rejoin_s=settings.rejoin_s,
                metrics=metrics,
                replays=stores.replays,
            ),
            inverting=SingleFlight(on_join=lambda: metrics.on_store_request(result="joined")),
        )

    @property
    def image_limits(self) -> ImageLimits:
        """The largest image that is decoded, by the settings."""
        settings = self.settings
        return ImageLimits(settings.max_image_bytes, settings.max_image_pixels, settings.max_image_aspect)

    def model(self, name: str, path: str = "model") -> ModelInfo:
        """The loaded model of this resource name, the default model for ``""``.

        Raises FieldInvalid at ``path`` for a malformed name, ModelNotFound, ModelLoading, and ModelNotReady if loading
        failed.
        """
        identifier = self.configured(name, path) if name else self.engine.configured[0]
        info = self.engine.models.get(identifier)
        if info is not None:
            return info
        error = self.engine.errors.get(identifier, self.engine.error)
        if error:
            raise ModelNotReady(
                f"{model_name(identifier)} failed to load: {error}",
                metadata={"resource_name": model_name(identifier)},
            )
        raise ModelLoading(f"{model_name(identifier)} is still loading; retry later", retry_after_s=_LOADING_RETRY_S)

    def configured(self, name: str, path: str) -> str:
        """The id in "models/{id}", if the server is configured with it. Raises FieldInvalid, ModelNotFound."""
        identifier = model_id(name, path)
        if identifier not in self.engine.configured:
            available = ", ".join(model_name(other) for other in self.engine.configured)
            raise ModelNotFound(
                f"this server has no {name}; choose one of {available}",
                metadata={"resource_type": "underpaint.v1.Model", "resource_name": name},
            )
        return identifier
