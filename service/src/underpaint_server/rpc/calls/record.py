"""One call as operators see it: its labels, its log line, its metrics."""

import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

import grpc
import structlog
from google.protobuf.message import Message
from underpaint.v1 import direction_service_pb2, edit_service_pb2, inversion_service_pb2

from underpaint_server.telemetry import Metrics
from underpaint_server.wire.names import is_request_id

_log = structlog.get_logger()

REQUEST_ID: ContextVar[str] = ContextVar("request_id")
"""Request id of the call that this task serves: the caller's, or a random one if it sent none."""

_MODEL_CHARS: Final = 80
"""Most characters of a model's name in labels and log lines; callers may send any text."""

_PATH_CHARS: Final = 120
"""Most characters of an RPC's path in log lines; callers may send any text."""

_QUIET = ("grpc.health.", "grpc.reflection.")
"""Services whose calls are logged at debug level only, since probes call them every few seconds."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Fields of a request for log lines and metrics."""

    request_id: str = ""
    """As sent, not validated."""
    method: str = ""
    """A value of :data:`underpaint_server.methods.JOB_NAMES`; empty for calls that compute nothing."""
    model: str = ""
    """Id; empty for the default model, and for calls that name none."""


def labels_of(request: Any) -> Labels:
    """Labels of a request message."""
    match request:
        case edit_service_pb2.EditRequest():
            return Labels(request.request_id, request.WhichOneof("method") or "", _id(request.model))
        case edit_service_pb2.StreamEditRequest() | edit_service_pb2.SubmitEditRequest():
            return labels_of(request.edit)
        case edit_service_pb2.ComputeMaskRequest():
            return Labels(request.edit.request_id, "mask", _id(request.edit.model))
        case inversion_service_pb2.InvertRequest():
            method = request.parameters.WhichOneof("method")
            return Labels(request.request_id, f"invert_{method}" if method else "", _id(request.model))
        case inversion_service_pb2.StreamInvertRequest():
            return labels_of(request.invert)
        case direction_service_pb2.LearnDirectionRequest():
            return Labels(request.request_id, "learn", _id(request.direction.model))
        case _:
            return Labels()


class CallRecord:
    """Records one call from its arrival to its end."""

    def __init__(self, metrics: Metrics, path: str, shape: str, default_model: str, *, is_known: bool = True) -> None:
        """``path`` is that of the RPC; one that this server does not have (``is_known`` False) is no label."""
        self._metrics = metrics
        self._path = path.lstrip("/")[:_PATH_CHARS]
        self._service, _, self._rpc = self._path.rpartition("/") if is_known else ("", "", "")
        self._shape = shape
        self._default_model = default_model
        self._labels = Labels()
        self._started = time.perf_counter()
        self._sent = 0
        self.request_id = str(uuid4())
        metrics.on_request_started(service=self._service, rpc=self._rpc, grpc_type=shape)
        self._bind()

    def received(self, message: Message, size: int) -> None:
        """Record a request message of ``size`` bytes; called for each message of a stream."""
        self._metrics.on_request_message(rpc=self._rpc, bytes=size)
        self._labels = labels_of(message)
        # A malformed id is refused later; until then it must not be written to trailers and log lines.
        if is_request_id(self._labels.request_id):
            self.request_id = self._labels.request_id
            self._bind()

    def sent(self, size: int) -> None:
        """Record a response message of ``size`` bytes; called for each message of a stream."""
        self._metrics.on_response_message(rpc=self._rpc, bytes=size)
        self._sent += 1
        if self._sent == 1 and self._labels.method and self._shape.endswith("stream"):
            self._metrics.on_first_event(method=self._labels.method, seconds=self._elapsed_s())

    def ended(self, code: grpc.StatusCode, reason: str = "") -> None:
        """Record the end of the call; ``reason`` is the ErrorInfo reason of a failure."""
        seconds, labels = self._elapsed_s(), self._labels
        model = (labels.model or self._default_model) if labels.method else ""
        self._metrics.on_request_handled(
            service=self._service,
            rpc=self._rpc,
            grpc_type=self._shape,
            code=code.name,
            seconds=seconds,
            reason=reason,
            method=labels.method,
            model=model,
        )
        write = _log.debug if self._service.startswith(_QUIET) else _log.info
        write(
            "rpc",
            rpc=self._path,
            method=labels.method,
            model=model,
            code=code.name,
            reason=reason,
            duration_s=round(seconds, 6),
        )

    def crashed(self, error: BaseException) -> None:
        """Log an unexpected error with its traceback, which the caller does not get."""
        _log.error("internal error", rpc=self._path, exc_info=error)

    def _bind(self) -> None:
        REQUEST_ID.set(self.request_id)
        structlog.contextvars.bind_contextvars(request_id=self.request_id)

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._started


def _id(model: str) -> str:
    return model.removeprefix("models/")[:_MODEL_CHARS]
