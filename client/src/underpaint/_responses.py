"""From response messages to results: pure functions."""

import array
import sys
from datetime import UTC, datetime
from typing import Any

from google.longrunning import operations_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from underpaint import _requests, _status, _wire, results
from underpaint.choices import Fit, Sampler
from underpaint.methods import INVERSION_METHODS, LEARN_METHODS
from underpaint.resources import Direction, InversionHandle, Origin
from underpaint.v1 import direction_service_pb2 as direction_pb
from underpaint.v1 import edit_service_pb2 as edit_pb
from underpaint.v1 import inversion_service_pb2 as inversion_pb
from underpaint.v1 import model_service_pb2 as model_pb
from underpaint.v1 import types_pb2 as types_pb


def edited(message: edit_pb.EditResponse, sent: _requests.Edit) -> results.Edited:
    """The result of an edit. It keeps the images that were sent, to make their inversions again after they expire."""
    return results.Edited(
        image_bytes=message.image.content,
        media_type=message.image.media_type or "image/png",
        mask_bytes=message.mask.content if message.HasField("mask") else None,
        **_answer(message, sent),
    )


def mask(message: edit_pb.ComputeMaskResponse, sent: _requests.Edit) -> results.Mask:
    """The result of a mask computation."""
    return results.Mask(
        mask_bytes=message.mask.content,
        difference=_floats(message.difference),
        coverage=_wire.short(message.coverage),
        **_answer(message, sent),
    )


def inverted(message: inversion_pb.InvertResponse, sent: inversion_pb.InvertRequest) -> results.Inversion:
    """The result of an inversion, with the photo to make it again after it expires."""
    stored = message.inversion
    origin = Origin(sent.image, stored.parameters, stored.model)
    return inversion(stored, origin=origin, usage=usage(message.usage), notices=_notices(message))


def inversion(message: inversion_pb.Inversion, **more: Any) -> results.Inversion:
    """A stored inversion; ``more`` are the fields that only a new one has."""
    return results.Inversion(
        name=message.name,
        model=message.model,
        parameters=_parameters(message.parameters),
        width=message.width,
        height=message.height,
        size_bytes=message.size_bytes,
        reconstruction_psnr_db=_optional(message, "reconstruction_psnr_db"),
        reconstruction_max_abs_error=_optional(message, "reconstruction_max_abs_error"),
        create_time=_time(message.create_time),
        expire_time=_time(message.expire_time),
        fitting=_fitting(message),
        **more,
    )


def progress(message: types_pb.Progress) -> results.Progress:
    """Progress of a request."""
    return results.Progress(
        phase=_wire.member(types_pb.Phase, results.Phase, message.phase) or results.Phase.UNKNOWN,
        step=message.step,
        total_steps=message.total_steps,
        fraction=_wire.short(message.fraction),
        queue_position=message.queue_position,
        eta_s=_seconds(message.eta) if message.HasField("eta") else None,
        loss=message.loss if message.HasField("loss") else None,
    )


def accepted(message: edit_pb.Accepted) -> results.Progress:
    """The server's admission of a request, as its first progress."""
    return results.Progress(results.Phase.QUEUED, 0, 0, 0.0, message.queue_position, None)


def preview(message: edit_pb.Preview) -> results.Preview:
    """A preview of the image."""
    return results.Preview(step=message.step, image_bytes=message.image.content)


def direction(message: direction_pb.Direction) -> Direction:
    """A learned direction."""
    method = _wire.text(direction_pb.LearnMethod, message.method)
    return Direction(
        name=message.name,
        display_name=message.display_name,
        model=message.model,
        model_digest=message.model_digest,
        source_prompt=message.source_prompt,
        target_prompt=message.target_prompt,
        steps=message.steps,
        weights=tuple(map(_wire.short, message.weights)),
        sampler=_wire.member(types_pb.Sampler, Sampler, message.sampler) or Sampler.DDIM,
        guidance_scale=_wire.short(message.guidance_scale),
        content_features=message.content_features,
        method=method if method in LEARN_METHODS else "",
        losses=tuple(message.losses),
        example_count=message.example_count,
        create_time=_time(message.create_time),
        etag=message.etag,
    )


def operation(message: operations_pb2.Operation) -> results.Operation:
    """An operation that learns a direction."""
    current, learned = types_pb.Progress(), direction_pb.Direction()
    has_progress = message.metadata.Unpack(current)
    has_direction = message.HasField("response") and message.response.Unpack(learned)
    return results.Operation(
        name=message.name,
        done=message.done,
        progress=progress(current) if has_progress else None,
        direction=direction(learned) if has_direction else None,
        error=_status.from_status(message.error) if message.HasField("error") else None,
    )


def model(message: model_pb.Model) -> results.Model:
    """A model and its limits."""
    limits = message.limits
    return results.Model(
        name=message.name,
        state=_wire.member(model_pb.ModelState, results.ModelState, message.state) or results.ModelState.UNKNOWN,
        digest=message.digest,
        methods=tuple(message.methods),
        limits=results.Limits(**{field.name: getattr(limits, field.name) for field in limits.DESCRIPTOR.fields}),
        error=message.error,
        width=message.width,
        height=message.height,
        default_steps=message.default_steps,
        feature_sites=tuple(message.feature_sites),
        prompt_tokens=message.prompt_tokens,
        exact_batching=_wire.member(model_pb.ExactBatching, results.ExactBatching, message.exact_batching)
        or results.ExactBatching.UNKNOWN,
        batch_class=message.batch_class,
        backend=message.backend,
    )


def usage(message: types_pb.Usage) -> results.Usage:
    """What a request cost."""
    return results.Usage(
        queue_time_s=_seconds(message.queue_time),
        compute_time_s=_seconds(message.compute_time),
        network_evaluations=message.network_evaluations,
        reused_evaluations=message.reused_evaluations,
        mean_batch_size=_wire.short(message.mean_batch_size),
        inversion_cache_hit=message.inversion_cache_hit,
    )


def _answer(message: Any, sent: _requests.Edit) -> dict[str, Any]:
    request, resolved, origin, second_image = sent.request, message.resolved, sent.origin, sent.second_image
    if request.WhichOneof("source") == "image":
        # A server of an earlier version leaves the parameters out of a resolved request whose source is an inversion.
        has_parameters = resolved.HasField("inversion_parameters")
        parameters = (resolved if has_parameters else request).inversion_parameters
        origin = Origin(request.image, parameters, resolved.model)
    second = _requests.second_of(request)
    if second is not None and second.HasField("image"):
        second_image = second.image
    return {
        "resolved": results.Resolved(resolved, origin, second_image),
        "inversion": InversionHandle(message.inversion, origin=origin) if message.inversion else None,
        "usage": usage(message.usage),
        "fitting": _fitting(message),
        "notices": _notices(message),
    }


def _parameters(message: inversion_pb.InversionParameters) -> results.InversionParameters:
    kind = INVERSION_METHODS.get(message.WhichOneof("method") or "")
    return results.InversionParameters(
        method=kind._read(message) if kind is not None else None,
        steps=message.steps,
        strength=_wire.short(message.strength),
        guidance_scale=_wire.short(message.guidance_scale),
        source_prompt=message.source_prompt,
    )


def _fitting(message: Any) -> results.Fitting | None:
    if not message.HasField("fitting"):
        return None
    fitting = message.fitting
    return results.Fitting(
        fit=_wire.member(types_pb.Fit, Fit, fitting.fit),
        source_size=(fitting.source_width, fitting.source_height),
        size=(fitting.width, fitting.height),
        source_box=results.Box(
            fitting.source_left, fitting.source_top, fitting.source_box_width, fitting.source_box_height
        ),
        box=results.Box(fitting.left, fitting.top, fitting.box_width, fitting.box_height),
    )


def _notices(message: Any) -> tuple[results.Notice, ...]:
    return tuple(results.Notice(notice.reason, notice.message) for notice in message.notices)


def _optional(message: Any, name: str) -> float | None:
    return _wire.short(getattr(message, name)) if message.HasField(name) else None


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def _time(stamp: Timestamp) -> datetime | None:
    return stamp.ToDatetime(UTC) if stamp.ByteSize() else None


def _floats(tensor: types_pb.Tensor) -> "memoryview[float]":
    values = array.array("f", tensor.data)
    if sys.byteorder == "big":
        values.byteswap()
    if len(tensor.shape) < 2 or not values:
        return memoryview(values)
    return memoryview(values).cast("B").cast("f", list(tensor.shape))
