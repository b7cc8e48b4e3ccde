"""DiffEdit's message in EditRequest."""

from dataclasses import replace
from typing import Final

from underpaint.v1.edit_service_pb2 import EditRequest

from underpaint_server.errors import FieldInvalid, FieldViolation
from underpaint_server.methods.diffedit.options import DiffEdit
from underpaint_server.methods.message import Completing, Message, Reading
from underpaint_server.wire import images
from underpaint_server.wire.drafts import EditSource

_THRESHOLD: Final = 0.5
_MASK_SAMPLES: Final = 10
_MASK_STRENGTH: Final = 0.5


def _read(reading: Reading) -> DiffEdit:
    message, reader, fields = reading.request.diffedit, reading.reader, reading.reader.fields
    if message.HasField("mask"):
        for descriptor, _ in message.ListFields():
            if descriptor.name != "mask":
                fields.report(f"diffedit.{descriptor.name}", "must be unset, because diffedit.mask is set")
    threshold = message.threshold if message.HasField("threshold") else _THRESHOLD
    mask_strength = message.mask_strength if message.HasField("mask_strength") else _MASK_STRENGTH
    return DiffEdit(
        mask=None,
        threshold=fields.fraction("diffedit.threshold", threshold, below_one=True),
        samples=fields.count("diffedit.samples", message.samples, _MASK_SAMPLES, reader.limits.max_mask_samples),
        mask_strength=fields.fraction("diffedit.mask_strength", mask_strength, below_one=True),
        reference_prompt=reader.prompt("diffedit.reference_prompt", message.reference_prompt),
    )


async def _complete(options: DiffEdit, completing: Completing) -> tuple[DiffEdit, None]:
    message = completing.request.diffedit
    if message.HasField("mask"):
        mask = await completing.fetch.mask(message.mask, completing.source.fitting, "diffedit.mask")
        options = replace(options, mask=mask)
    return options, None


def _check_mask(request: EditRequest) -> None:
    if request.diffedit.HasField("mask"):
        raise FieldInvalid(FieldViolation("diffedit.mask", "must be unset, because ComputeMask computes the mask"))


def _write(request: EditRequest, options: DiffEdit, _source: EditSource) -> None:
    message = request.diffedit
    if options.mask is not None:
        message.mask.CopyFrom(images.encode(options.mask))
        return
    message.threshold = options.threshold
    message.samples = options.samples
    message.mask_strength = options.mask_strength
    message.reference_prompt = options.reference_prompt


MESSAGE = Message(read=_read, write=_write, guidance_scale=5.0, complete=_complete, check_mask=_check_mask)
