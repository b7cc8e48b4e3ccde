"""From messages to results: pure functions."""

import array
import sys
from datetime import UTC, datetime
from typing import Any

from google.longrunning import operations_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from underpaint import _status, results
from underpaint.methods import Convention, DdimInversion, EdictInversion, Fit, Sampler
from underpaint.results import Origin
from underpaint.v1 import direction_service_pb2 as direction_pb
from underpaint.v1 import edit_service_pb2 as edit_pb
from underpaint.v1 import inversion_service_pb2 as inversion_pb
from underpaint.v1 import model_service_pb2 as model_pb
from underpaint.v1 import types_pb2 as types_pb


def edited(message: edit_pb.EditResponse, sent: edit_pb.EditRequest, origin: Origin | None) -> results.Edited:
    """The result of an edit; ``sent`` and ``origin`` are kept so that it can be repeated and built upon."""
    return results.Edited(
        image_bytes=message.image.content,
        media_type=message.image.media_type or "image/png",
        mask_bytes=message.mask.content if message.HasField("mask") else None,
        **_answer(message, sent, origin),
    )


def mask(message: edit_pb.ComputeMaskResponse, sent: edit_pb.EditRequest, origin: Origin | None) -> results.Mask:
    """The result of a mask computation."""
    return results.Mask(
        mask_bytes=message.mask.content,
        difference=_floats(message.difference),
        coverage=_short(message.coverage),
        **_answer(message, sent, origin),
    )


def inverted(message: inversion_pb.InvertResponse, sent: inversion_pb.InvertRequest) -> results.Inversion:
    """The result of an inversion, with the photo to make it again."""
    made = message.inversion
    origin = Origin(sent.image, made.parameters, made.model)
    return inversion(made, origin=origin, usage=usage(message.usage), notices=_notices(message))


def inversion(message: inversion_pb.Inversion, **more: Any) -> results.Inversion:
    """A stored inversion."""
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
    """A snapshot."""
    return results.Progress(
        phase=_known(results.Phase, types_pb.Phase, "PHASE_", message.phase),
        step=message.step,
        total_steps=message.total_steps,
        fraction=_short(message.fraction),
        queue_position=message.queue_position,
        eta_s=_seconds(message.eta) if message.HasField("eta") else None,
        loss=message.loss if message.HasField("loss") else None,
    )


def accepted(message: edit_pb.Accepted) -> results.Progress:
    """Admission, as the first snapshot."""
    return results.Progress(results.Phase.QUEUED, 0, 0, 0.0, message.queue_position, None)


def preview(message: edit_pb.Preview) -> results.Preview:
    """A look on the way."""
    return results.Preview(step=message.step, image_bytes=message.image.content)


def direction(message: direction_pb.Direction) -> results.Direction:
    """A learned edit."""
    plms = message.sampler == types_pb.SAMPLER_PLMS
    return results.Direction(
        name=message.name,
        display_name=message.display_name,
        model=message.model,
        model_digest=message.model_digest,
        source_prompt=message.source_prompt,
        target_prompt=message.target_prompt,
        steps=message.steps,
        weights=tuple(map(_short, message.weights)),
        sampler=Sampler.PLMS if plms else Sampler.DDIM,
        guidance_scale=_short(message.guidance_scale),
        content_features=message.content_features,
        method=_LEARN_METHODS.get(message.method, ""),
        losses=tuple(message.losses),
        example_count=message.example_count,
        create_time=_time(message.create_time),
        etag=message.etag,
    )


def operation(message: operations_pb2.Operation) -> results.Operation:
    """An operation that learns a direction."""
    now, learned = types_pb.Progress(), direction_pb.Direction()
    has_progress = message.metadata.Unpack(now)
    has_learned = message.HasField("response") and message.response.Unpack(learned)
    return results.Operation(
        name=message.name,
        done=message.done,
        progress=progress(now) if has_progress else None,
        direction=direction(learned) if has_learned else None,
        error=_status.from_status(message.error) if message.HasField("error") else None,
    )


def model(message: model_pb.Model) -> results.Model:
    """A model and its limits."""
    limits = message.limits
    return results.Model(
        name=message.name,
        state=_known(results.ModelState, model_pb.ModelState, "MODEL_STATE_", message.state),
        digest=message.digest,
        methods=tuple(message.methods),
        limits=results.Limits(**{field.name: getattr(limits, field.name) for field in limits.DESCRIPTOR.fields}),
        error=message.error,
        width=message.width,
        height=message.height,
        default_steps=message.default_steps,
        feature_sites=tuple(message.feature_sites),
        prompt_tokens=message.prompt_tokens,
    )


def usage(message: types_pb.Usage) -> results.Usage:
    """Cost."""
    return results.Usage(
        queue_time_s=_seconds(message.queue_time),
        compute_time_s=_seconds(message.compute_time),
        network_evaluations=message.network_evaluations,
        mean_batch_size=_short(message.mean_batch_size),
        inversion_cache_hit=message.inversion_cache_hit,
    )


def _answer(message: Any, sent: edit_pb.EditRequest, origin: Origin | None) -> dict[str, Any]:
    if sent.WhichOneof("source") == "image":
        # What was asked, not what was resolved: with an inversion for its source, a resolved request has no parameters.
        origin = Origin(sent.image, sent.inversion_parameters, message.resolved.model)
    return {
        "resolved": results.Resolved(message.resolved, origin),
        "inversion": results.InversionHandle(message.inversion, origin=origin) if message.inversion else None,
        "usage": usage(message.usage),
        "fitting": _fitting(message),
        "notices": _notices(message),
    }


def _parameters(message: inversion_pb.InversionParameters) -> results.InversionParameters:
    method: EdictInversion | DdimInversion
    if message.WhichOneof("method") == "ddim":
        current = message.ddim.convention == inversion_pb.DDIM_CONVENTION_CURRENT
        convention = Convention.CURRENT if current else Convention.TARGET
        method = DdimInversion(convention=convention, features=tuple(message.ddim.features))
    else:
        method = EdictInversion(mixing_coefficient=_short(message.edict.mixing_coefficient))
    return results.InversionParameters(
        method, message.steps, _short(message.strength), _short(message.guidance_scale), message.source_prompt
    )


def _fitting(message: Any) -> results.Fitting | None:
    if not message.HasField("fitting"):
        return None
    f = message.fitting
    return results.Fitting(
        fit=Fit(types_pb.Fit.Name(f.fit).removeprefix("FIT_").lower()) if f.fit in _FITS else None,
        source_size=(f.source_width, f.source_height),
        size=(f.width, f.height),
        source_box=results.Box(f.source_left, f.source_top, f.source_box_width, f.source_box_height),
        box=results.Box(f.left, f.top, f.box_width, f.box_height),
    )


_LEARN_METHODS = {
    int(direction_pb.LEARN_METHOD_GRADIENT): "gradient",
    int(direction_pb.LEARN_METHOD_SEARCH): "search",
}
_FITS = (types_pb.FIT_CROP, types_pb.FIT_PAD, types_pb.FIT_RESIZE)


def _notices(message: Any) -> tuple[results.Notice, ...]:
    return tuple(results.Notice(notice.reason, notice.message) for notice in message.notices)


def _known(kind: Any, wire: Any, prefix: str, value: int) -> Any:
    if value == 0 or value not in wire.values():
        return kind.UNKNOWN  # a newer server may say more than this client knows
    return kind(wire.Name(value).removeprefix(prefix).lower())


def _optional(message: Any, name: str) -> float | None:
    return _short(getattr(message, name)) if message.HasField(name) else None


def _short(value: float) -> float:
    """0.8 instead of 0.800000011920929: a float32 has seven digits."""
    return float(f"{value:.7g}")


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
