"""Parts of several responses: progress, usage, notices, fitting, file chunks, durations and timestamps as messages."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Final, TypeVar

import google_crc32c
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from underpaint.v1 import direction_service_pb2, inversion_service_pb2, types_pb2

from underpaint_server.jobs import Notice, Phase, Progress, Usage
from underpaint_server.wire.fitting import Fitting

_PHASES: Final = {phase: types_pb2.Phase.Value(f"PHASE_{phase.name}") for phase in Phase}
_CHUNK_BYTES: Final = 1024 * 1024

Chunk = TypeVar("Chunk", direction_service_pb2.ExportDirectionResponse, inversion_service_pb2.ExportInversionResponse)


def progress(now: Progress, loss: float | None = None) -> types_pb2.Progress:
    """Progress as a message; ``loss`` is set while learning only."""
    return types_pb2.Progress(
        phase=_PHASES[now.phase],
        step=now.step,
        total_steps=now.total_steps,
        fraction=now.fraction,
        queue_position=now.queue_position,
        eta=duration(now.eta_s),
        loss=loss,
    )


def fitting(record: Fitting) -> types_pb2.Fitting:
    """How the image was fitted, as a message."""
    return types_pb2.Fitting(**asdict(record))


def usage(spent: Usage, cache_hit: bool) -> types_pb2.Usage:
    """What the job cost, as a message; ``cache_hit`` says whether the inversion was stored already."""
    return types_pb2.Usage(
        queue_time=duration(spent.queue_time_s),
        compute_time=duration(spent.compute_time_s),
        network_evaluations=spent.network_evaluations,
        reused_evaluations=spent.reused_evaluations,
        mean_batch_size=spent.mean_batch_size,
        inversion_cache_hit=cache_hit,
    )


def notices(raised: tuple[Notice, ...]) -> list[types_pb2.Notice]:
    """Notices as messages."""
    return [types_pb2.Notice(reason=notice.reason, message=notice.message) for notice in raised]


def file_chunks(message: type[Chunk], data: bytes) -> Iterator[Chunk]:
    """A file, which is not empty, in chunks of 1 MiB: the first message has the size, the last the CRC-32C."""
    starts = range(0, len(data), _CHUNK_BYTES)
    for start in starts:
        yield message(
            total_bytes=len(data) if start == 0 else 0,
            chunk=data[start : start + _CHUNK_BYTES],
            crc32c=google_crc32c.value(data) if start == starts[-1] else 0,
        )


def server_timing(spent: types_pb2.Usage) -> str:
    """The value of the ``server-timing`` trailer: queue time and compute time in milliseconds."""
    queue, compute = spent.queue_time.ToNanoseconds() / 1e6, spent.compute_time.ToNanoseconds() / 1e6
    return f"queue;dur={queue:.1f}, compute;dur={compute:.1f}"


def duration(seconds: float) -> Duration:
    """A duration in seconds as a message."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def timestamp(seconds: float) -> Timestamp:
    """A Unix time in seconds as a message."""
    message = Timestamp()
    message.FromNanoseconds(round(seconds * 1e9))
    return message
