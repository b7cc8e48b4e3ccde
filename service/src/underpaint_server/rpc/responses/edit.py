"""Results of edits as messages, and the ``resolved`` request that gives the same result again.

If the inversion of the source is stored, the source of ``resolved`` is the inversion's name. If there is none (SDEdit
and ComputeMask of an image, or an inversion that could not be stored), the source is ``image``: a PNG of the fitted
pixels, which fitting does not change. In both cases ``inversion_parameters`` say how the source is inverted, so that an
edit can be repeated from its photo when the inversion is gone. A given mask is included at the fitted size.
``request_id`` is empty, since a repeat is a new request.

Encoding blocks and belongs on a thread.
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
    """The request that gives the same result again, with every default filled in."""
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


def preview(event: Preview, longest_px: int) -> edit_service_pb2.Preview:
    """A preview as a message; the longest side of its image is at most ``longest_px`` pixels."""
    return edit_service_pb2.Preview(image=images.encode_preview(event.pixels, longest_px), step=event.step)


def tensor(array: Array) -> types_pb2.Tensor:
    """An array as a float32 tensor message."""
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
            # FIT_RESIZE is the only fit that keeps a size other than the model's own.
            request.image.fit = types_pb2.FIT_RESIZE
        case _:
            request.inversion = inversion_name(source.name)
    if source.inversion is not None and not isinstance(source.source, Generated):
        request.inversion_parameters.CopyFrom(inversion_parameters(source.inversion))
