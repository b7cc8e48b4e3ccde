"""The ModelService: the models of this server, their methods and the limits of requests."""

# ruff: noqa: N802, ARG002 (methods and their arguments are the contract's)

from typing import Final

from underpaint.v1 import model_service_pb2 as messages
from underpaint.v1 import model_service_pb2_grpc

from underpaint_server.dispatch.supervisor import EngineState
from underpaint_server.errors import FieldInvalid, FieldViolation, MethodDisabled
from underpaint_server.jobs import Exactness
from underpaint_server.rpc.calls.messages import Context
from underpaint_server.rpc.context import ServerContext
from underpaint_server.wire.fields import page_size
from underpaint_server.wire.names import model_name

_STATES: Final = {
    EngineState.STARTING: messages.MODEL_STATE_LOADING,
    EngineState.READY: messages.MODEL_STATE_READY,
    EngineState.RESTARTING: messages.MODEL_STATE_LOADING,
    EngineState.FAILED: messages.MODEL_STATE_FAILED,
    EngineState.CLOSED: messages.MODEL_STATE_DRAINING,
}

_EXACTNESS: Final = {
    Exactness.ANY_SIZE: messages.EXACT_BATCHING_ANY_SIZE,
    Exactness.ROW_BY_ROW: messages.EXACT_BATCHING_ROW_BY_ROW,
    Exactness.FIXED_SIZE: messages.EXACT_BATCHING_FIXED_SIZE,
    Exactness.INEXACT: messages.EXACT_BATCHING_INEXACT,
}


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """Reads models. They are configured when the server starts, so loading and unloading are not supported."""

    def __init__(self, server: ServerContext) -> None:
        self._server = server

    async def GetModel(self, request: messages.GetModelRequest, context: Context) -> messages.GetModelResponse:
        """Return one model, loaded or not."""
        return messages.GetModelResponse(model=self._model(self._server.configured(request.name, "name")))

    async def ListModels(self, request: messages.ListModelsRequest, context: Context) -> messages.ListModelsResponse:
        """Return one page of models, the default model first."""
        size, identifiers = page_size(request.page_size), self._server.engine.configured
        first = _first(request.page_token, identifiers)
        page, rest = identifiers[first : first + size], identifiers[first + size :]
        return messages.ListModelsResponse(
            models=[self._model(identifier) for identifier in page],
            next_page_token=model_name(rest[0]) if rest else "",
        )

    async def LoadModel(self, request: messages.LoadModelRequest, context: Context) -> messages.LoadModelResponse:
        """Not supported: raises MethodDisabled."""
        raise MethodDisabled(
            "models cannot be loaded or unloaded at run time; choose them with --models when starting the server"
        )

    async def UnloadModel(self, request: messages.UnloadModelRequest, context: Context) -> messages.UnloadModelResponse:
        """Not supported: raises MethodDisabled."""
        raise MethodDisabled(
            "models cannot be loaded or unloaded at run time; choose them with --models when starting the server"
        )

    def _model(self, identifier: str) -> messages.Model:
        engine, settings = self._server.engine, self._server.settings
        state = messages.MODEL_STATE_DRAINING if self._server.draining else _STATES[engine.state]
        error = engine.errors.get(identifier, engine.error)
        if error and not self._server.draining:
            state = messages.MODEL_STATE_FAILED
        limits = messages.Limits(
            max_image_bytes=settings.max_image_bytes,
            max_image_pixels=settings.max_image_pixels,
            max_steps=settings.max_steps,
            max_batch_size=settings.max_batch_size,
            max_prompt_chars=settings.max_prompt_chars,
            max_mask_samples=settings.max_mask_samples,
        )
        model = messages.Model(name=model_name(identifier), state=state, error=error, limits=limits)
        info = engine.models.get(identifier)
        if info is not None:
            model.digest, model.width, model.height = info.digest, info.width, info.height
            model.default_steps, model.limits.size_multiple = info.default_steps, info.size_multiple
            model.limits.max_steps = min(settings.max_steps, info.max_steps)
            model.methods.extend(info.methods)
            model.feature_sites.extend(info.feature_sites)
            model.prompt_tokens = info.prompt_tokens
            model.exact_batching, model.batch_class = _EXACTNESS[info.exactness], info.batch_class or 0
            model.backend = info.backend
        return model


def _first(token: str, identifiers: tuple[str, ...]) -> int:
    if not token:
        return 0
    names = [model_name(identifier) for identifier in identifiers]
    if token not in names:
        raise FieldInvalid(
            FieldViolation("page_token", "not a page token: send the next_page_token of the previous page, unchanged")
        )
    return names.index(token)
