"""What all servicers share."""

from dataclasses import dataclass
from typing import Any

from underpaint_server.engine.handle import EngineHandle
from underpaint_server.engine.supervisor import EngineState
from underpaint_server.errors import ModelLoading, ModelNotFound, ModelNotReady
from underpaint_server.jobs import ModelInfo
from underpaint_server.rpc.flights import Flights
from underpaint_server.rpc.images import ImageLimits
from underpaint_server.rpc.manager import Manager
from underpaint_server.rpc.names import model_id, model_name
from underpaint_server.rpc.pool import Pool
from underpaint_server.rpc.replay import Replay
from underpaint_server.settings import Settings
from underpaint_server.stores.blobs import Blobs
from underpaint_server.stores.directions import DirectionStore
from underpaint_server.stores.inversions import InversionStore
from underpaint_server.stores.operations import OperationStore
from underpaint_server.stores.urls import open_store
from underpaint_server.telemetry import Metrics

_LOADING_RETRY_S = 2.0


@dataclass(slots=True)
class Front:
    """The parts of the front process; lives on its event loop."""

    settings: Settings
    engine: EngineHandle
    store: InversionStore
    directions: DirectionStore
    operations: OperationStore
    learning: Manager
    metrics: Metrics
    pool: Pool
    replay: Replay
    inverting: Flights[Any]
    """Inversions being made for InversionService, by name."""
    draining: bool = False
    """Set once, when the server is about to stop."""

    @classmethod
    def build(cls, settings: Settings, engine: EngineHandle, store: InversionStore, metrics: Metrics) -> "Front":
        """All parts from the settings. Directions and operations live in the place of the inversions."""
        place = Blobs(open_store(settings.store_url))
        directions, operations = DirectionStore(place), OperationStore(place)
        return cls(
            settings=settings,
            engine=engine,
            store=store,
            directions=directions,
            operations=operations,
            learning=Manager(settings, engine, operations, directions),
            metrics=metrics,
            pool=Pool(settings.max_running + settings.queue_capacity),
            replay=Replay(ttl_s=settings.replay_ttl_s, max_bytes=settings.replay_bytes, metrics=metrics),
            inverting=Flights(on_join=lambda: metrics.on_store_request(result="joined")),
        )

    @property
    def image_limits(self) -> ImageLimits:
        """What is decoded at all."""
        return ImageLimits(self.settings.max_image_bytes, self.settings.max_image_pixels)

    def model(self, name: str, path: str = "model") -> ModelInfo:
        """The model of that name, the default one for ``""``, once it is loaded.

        Raises FieldInvalid at ``path``, ModelNotFound, ModelLoading, ModelNotReady.
        """
        identifier = self.configured(name, path) if name else self.engine.configured[0]
        info = self.engine.models.get(identifier)
        if info is not None:
            return info
        if self.engine.state is EngineState.FAILED:
            raise ModelNotReady(
                f"{model_name(identifier)} failed to load: {self.engine.error}",
                metadata={"resource_name": model_name(identifier)},
            )
        raise ModelLoading(f"{model_name(identifier)} is still loading", retry_after_s=_LOADING_RETRY_S)

    def configured(self, name: str, path: str) -> str:
        """The id in "models/{id}" if the server has it, loaded or not. Raises FieldInvalid, ModelNotFound."""
        identifier = model_id(name, path)
        if identifier not in self.engine.configured:
            there = ", ".join(model_name(other) for other in self.engine.configured)
            raise ModelNotFound(
                f"no {name} here; there is {there}",
                metadata={"resource_type": "underpaint.v1.Model", "resource_name": name},
            )
        return identifier
