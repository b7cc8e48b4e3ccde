"""Stored directions as messages."""

from typing import Final

from underpaint.v1 import direction_service_pb2 as messages

from underpaint_server.jobs import Descent, Search
from underpaint_server.rpc.responses.common import timestamp
from underpaint_server.stores.directions import Entry
from underpaint_server.wire.names import direction_name, model_name
from underpaint_server.wire.reader import SAMPLERS

_METHODS: Final = {Descent: messages.LEARN_METHOD_GRADIENT, Search: messages.LEARN_METHOD_SEARCH}


def direction(entry: Entry) -> messages.Direction:
    """A stored direction as a message."""
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
        create_time=timestamp(entry.create_time.timestamp()),
        etag=entry.etag,
        sampler=SAMPLERS[options.sampler],
        guidance_scale=options.guidance_scale,
        content_features=stored.content_features,
        losses=stored.losses,
        method=_METHODS[type(options.method)],
        example_count=stored.example_count,
    )
