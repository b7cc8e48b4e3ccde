"""Progress and time as messages."""

from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from underpaint.v1 import types_pb2

from underpaint_server.jobs import Phase, Progress

_PHASES: Final = {phase: types_pb2.Phase.Value(f"PHASE_{phase.name}") for phase in Phase}


def progress(now: Progress, loss: float | None = None) -> types_pb2.Progress:
    """A snapshot; ``loss`` is that of learning."""
    return types_pb2.Progress(
        phase=_PHASES[now.phase],
        step=now.step,
        total_steps=now.total_steps,
        fraction=now.fraction,
        queue_position=now.queue_position,
        eta=duration(now.eta_s),
        loss=loss,
    )


def duration(seconds: float) -> Duration:
    """A length of time."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def timestamp(seconds: float) -> Timestamp:
    """Unix time."""
    message = Timestamp()
    message.FromNanoseconds(round(seconds * 1e9))
    return message
