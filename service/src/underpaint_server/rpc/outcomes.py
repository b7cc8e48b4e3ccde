"""Directions and operations as messages."""

from typing import Final

from google.longrunning import operations_pb2
from google.protobuf.message import DecodeError
from underpaint.v1 import direction_service_pb2 as messages

from underpaint_server.errors import StoreCorrupt, UnderpaintError
from underpaint_server.jobs import Descent, LearnOptions, Phase, Progress, Search
from underpaint_server.rpc import snapshots, status
from underpaint_server.rpc.names import direction_name, model_name, operation_name
from underpaint_server.rpc.reading import SAMPLERS
from underpaint_server.stores.directions import Entry

_METHODS: Final = {Descent: messages.LEARN_METHOD_GRADIENT, Search: messages.LEARN_METHOD_SEARCH}


def direction(entry: Entry) -> messages.Direction:
    """A stored direction."""
    stored, options = entry.direction, entry.direction.options
    return messages.Direction(
        name=direction_name(entry.name),
        display_name=stored.display_name,
        model=model_name(stored.model),
        model_digest=stored.model_digest,
        source_prompt=options.source_prompt,
        target_prompt=options.target_prompt,
        steps=options.num_inference_steps,
        weights=stored.weights,
        create_time=snapshots.timestamp(entry.create_time.timestamp()),
        etag=entry.etag,
        sampler=SAMPLERS[options.sampler],
        guidance_scale=options.guidance_scale,
        content_features=stored.content_features,
        losses=stored.losses,
        method=_METHODS[type(options.method)],
        example_count=stored.example_count,
    )


def total_steps(options: LearnOptions) -> int:
    """Optimiser steps of a whole operation."""
    return options.method.optimization_steps if isinstance(options.method, Descent) else 1


def unfinished(name: str, now: Progress, loss: float | None) -> operations_pb2.Operation:
    """An operation under way."""
    operation = operations_pb2.Operation(name=operation_name(name))
    operation.metadata.Pack(snapshots.progress(now, loss))
    return operation


def succeeded(name: str, entry: Entry) -> operations_pb2.Operation:
    """An operation that has learned this direction."""
    steps = total_steps(entry.direction.options)
    done = Progress(Phase.OPTIMIZING, steps, steps, 1.0)
    operation = unfinished(name, done, entry.direction.losses[-1] if entry.direction.losses else None)
    operation.done = True
    operation.response.Pack(direction(entry))
    return operation


def failed(name: str, error: UnderpaintError, request_id: str) -> operations_pb2.Operation:
    """An operation that ended with an error, or was cancelled."""
    operation = operations_pb2.Operation(name=operation_name(name), done=True)
    operation.error.CopyFrom(status.rich_status(error, request_id))
    return operation


def parsed(data: bytes) -> operations_pb2.Operation:
    """A stored operation; raises StoreCorrupt."""
    try:
        return operations_pb2.Operation.FromString(data)
    except DecodeError as error:
        raise StoreCorrupt("the end of an operation cannot be read") from error
