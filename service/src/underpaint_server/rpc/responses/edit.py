"""From results to messages, and the ``resolved`` request that would give the same answer again.

``resolved`` has no pixels wherever latents in the store stand for them: its source is then the inversion's name, and
``inversion_parameters`` are empty, for they are the inversion's. Where there is no such inversion (SDEdit and
ComputeMask of an image, or a store that could not take it) only pixels can repeat the answer: ``image`` then holds the
PNG of the fitted picture, which fitting leaves as it is. A given mask stays, at the fitted size. ``request_id`` is
empty: a repeat is a new request. Encoding is blocking work for a thread.
"""

import numpy as np
from underpaint.v1 import edit_service_pb2, types_pb2

from underpaint_server.jobs import Array, Edited, EditJob, Generated, Masked, MaskJob, Photo, Preview, Priority, Stored
from underpaint_server.methods.message import message_of
from underpaint_server.rpc.requests.inversion import inversion_parameters
from underpaint_server.rpc.responses.common import fitting, notices, usage
from underpaint_server.wire import images
from underpaint_server.wire.drafts import EditSource
from underpaint_server.wire.names import inversion_name, model_name


def edited(
    job: EditJob, source: EditSource, result: Edited, media_type: str, priority: Priority
) -> edit_service_pb2.EditResponse:
    """The answer to an edit."""
    return edit_service_pb2.EditResponse(
        image=images.encode(result.pixels, media_type),
        mask=None if result.mask is None else images.encode(result.mask),
        resolved=resolved(job, source, media_type, priority),
        inversion=inversion_name(source.name) if source.name else "",
        usage=usage(result.usage, isinstance(source.source, Stored)),
        fitting=None if isinstance(source.source, Generated) else fitting(source.fitting),
        notices=notices(result.notices),
    )


def masked(
    job: MaskJob, source: EditSource, result: Masked, media_type: str, priority: Priority
) -> edit_service_pb2.ComputeMaskResponse:
    """The answer to ComputeMask."""
    return edit_service_pb2.ComputeMaskResponse(
        mask=images.encode(result.mask),
        difference=tensor(result.difference),
        coverage=result.coverage,
        resolved=resolved(job, source, media_type, priority),
        inversion=inversion_name(source.name) if source.name else "",
        usage=usage(result.usage, isinstance(source.source, Stored)),
        fitting=None if isinstance(source.source, Generated) else fitting(source.fitting),
        notices=notices(result.notices),
    )


def resolved(
    job: EditJob | MaskJob, source: EditSource, media_type: str, priority: Priority
) -> edit_service_pb2.EditRequest:
    """The request that gives the same answer again, every default spelled out."""
    request = edit_service_pb2.EditRequest(
        model=model_name(job.model),
        target_prompt=job.target_prompt,
        negative_prompt=job.negative_prompt,
        seed=job.seed,
        guidance_scale=job.guidance_scale,
        output_media_type=media_type,
        priority=types_pb2.Priority.Value(f"PRIORITY_{priority.name}"),
    )
    _set_source(request, source)
    message_of(job.method.name).write(request, job.method, source)
    return request


def preview(now: Preview, longest_px: int) -> edit_service_pb2.Preview:
    """A rough look, its longest side ``longest_px`` pixels at most."""
    return edit_service_pb2.Preview(image=images.encode_preview(now.pixels, longest_px), step=now.step)


def tensor(array: Array) -> types_pb2.Tensor:
    """An array as float32."""
    data = np.ascontiguousarray(array, dtype="<f4")
    return types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=data.shape, data=data.tobytes())


def _set_source(request: edit_service_pb2.EditRequest, source: EditSource) -> None:
    match source.source:
        case Generated() as generated:
            request.generated.CopyFrom(
                edit_service_pb2.GeneratedSource(
                    prompt=generated.prompt,
                    seed=generated.seed,
                    width=generated.width,
                    height=generated.height,
                    steps=generated.num_inference_steps,
                )
            )
        case Photo(pixels=pixels) if not source.name:
            request.image.CopyFrom(images.encode(pixels))
            # The only fit that keeps a size other than the model's own.
            request.image.fit = types_pb2.FIT_RESIZE
            if source.inversion is not None:
                request.inversion_parameters.CopyFrom(inversion_parameters(source.inversion))
        case _:
            request.inversion = inversion_name(source.name)
