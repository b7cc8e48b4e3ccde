"""From results to messages, and the ``resolved`` request that would give the same answer again.

``resolved`` has no pixels wherever latents in the store stand for them: its source is then the inversion's name, and
``inversion_parameters`` are empty, for they are the inversion's. Where there is no such inversion (SDEdit and
ComputeMask of an image, or a store that could not take it) only pixels can repeat the answer: ``image`` then holds the
PNG of the fitted picture, which fitting leaves as it is. A given mask stays, at the fitted size. ``request_id`` is
empty: a repeat is a new request. Encoding is blocking work for a thread.
"""

from dataclasses import asdict

import numpy as np
from underpaint.v1 import edit_service_pb2, inversion_service_pb2, types_pb2

from underpaint_server.jobs import (
    Array,
    Edited,
    EditJob,
    Generated,
    Masked,
    MaskJob,
    Notice,
    Photo,
    Preview,
    Priority,
    Usage,
)
from underpaint_server.rpc import images
from underpaint_server.rpc.drafts import Start
from underpaint_server.rpc.fitting import Fitting
from underpaint_server.rpc.methods import method_of
from underpaint_server.rpc.names import inversion_name, model_name
from underpaint_server.rpc.parameters import parameters
from underpaint_server.rpc.snapshots import duration, timestamp
from underpaint_server.stores.inversions import Entry


def edited(
    job: EditJob, start: Start, result: Edited, media_type: str, priority: Priority
) -> edit_service_pb2.EditResponse:
    """The answer to an edit."""
    return edit_service_pb2.EditResponse(
        image=images.encode(result.pixels, media_type),
        mask=None if result.mask is None else images.encode(result.mask),
        resolved=resolved(job, start, media_type, priority),
        inversion=inversion_name(start.name) if start.name else "",
        usage=usage(result.usage, start.hit),
        fitting=None if isinstance(start.source, Generated) else fitting(start.fitting),
        notices=notices(result.notices),
    )


def masked(
    job: MaskJob, start: Start, result: Masked, media_type: str, priority: Priority
) -> edit_service_pb2.ComputeMaskResponse:
    """The answer to ComputeMask."""
    return edit_service_pb2.ComputeMaskResponse(
        mask=images.encode(result.mask),
        difference=tensor(result.difference),
        coverage=result.coverage,
        resolved=resolved(job, start, media_type, priority),
        inversion=inversion_name(start.name) if start.name else "",
        usage=usage(result.usage, start.hit),
        fitting=None if isinstance(start.source, Generated) else fitting(start.fitting),
        notices=notices(result.notices),
    )


def resolved(job: EditJob | MaskJob, start: Start, media_type: str, priority: Priority) -> edit_service_pb2.EditRequest:
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
    _set_source(request, start)
    method = method_of(job.method)
    method.write(request, job.method)
    if method.write_content is not None and start.content is not None:
        method.write_content(request, start.content)
    return request


def inversion(identifier: str, entry: Entry, fitted: Fitting | None = None) -> inversion_service_pb2.Inversion:
    """A stored inversion; ``fitted`` replaces the stored record where this request's own image was fitted."""
    stored = entry.inversion
    return inversion_service_pb2.Inversion(
        name=inversion_name(identifier),
        model=model_name(stored.model),
        parameters=parameters(stored.options),
        width=stored.width,
        height=stored.height,
        reconstruction_psnr_db=stored.reconstruction_psnr_db,
        reconstruction_max_abs_error=stored.reconstruction_max_abs_error,
        size_bytes=entry.size_bytes,
        create_time=timestamp(entry.create_time.timestamp()),
        expire_time=timestamp(entry.expire_time.timestamp()),
        fitting=fitting(fitted or Fitting(**entry.fitting)),
    )


def fitting(record: Fitting) -> types_pb2.Fitting:
    """How the picture was fitted."""
    return types_pb2.Fitting(**asdict(record))


def usage(spent: Usage, cache_hit: bool) -> types_pb2.Usage:
    """What the job cost."""
    return types_pb2.Usage(
        queue_time=duration(spent.queue_time_s),
        compute_time=duration(spent.compute_time_s),
        network_evaluations=spent.network_evaluations,
        mean_batch_size=spent.mean_batch_size,
        inversion_cache_hit=cache_hit,
    )


def notices(told: tuple[Notice, ...]) -> list[types_pb2.Notice]:
    """What the caller should know."""
    return [types_pb2.Notice(reason=notice.reason, message=notice.message) for notice in told]


def preview(now: Preview, longest_px: int) -> edit_service_pb2.Preview:
    """A rough look, its longest side ``longest_px`` pixels at most."""
    return edit_service_pb2.Preview(image=images.encode_preview(now.pixels, longest_px), step=now.step)


def tensor(array: Array) -> types_pb2.Tensor:
    """An array as float32."""
    data = np.ascontiguousarray(array, dtype="<f4")
    return types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=data.shape, data=data.tobytes())


def server_timing(spent: types_pb2.Usage) -> str:
    """The ``server-timing`` trailer: milliseconds queued and computed."""
    queue, compute = spent.queue_time.ToNanoseconds() / 1e6, spent.compute_time.ToNanoseconds() / 1e6
    return f"queue;dur={queue:.1f}, compute;dur={compute:.1f}"


def _set_source(request: edit_service_pb2.EditRequest, start: Start) -> None:
    match start.source:
        case Generated() as drawn:
            request.generated.CopyFrom(
                edit_service_pb2.GeneratedSource(
                    prompt=drawn.prompt,
                    seed=drawn.seed,
                    width=drawn.width,
                    height=drawn.height,
                    steps=drawn.num_inference_steps,
                )
            )
        case Photo(pixels=pixels) if not start.name:
            request.image.CopyFrom(images.encode(pixels))
            # The only fit that keeps a size other than the model's own.
            request.image.fit = types_pb2.FIT_RESIZE
            if start.inversion is not None:
                request.inversion_parameters.CopyFrom(parameters(start.inversion))
        case _:
            request.inversion = inversion_name(start.name)
