"""DiffEdit on the wire."""

from typing import Final

from underpaint.v1.edit_service_pb2 import EditRequest

from underpaint_server.jobs import DiffEdit
from underpaint_server.rpc import images
from underpaint_server.rpc.method import Asked, Method

_THRESHOLD: Final = 0.5
_MASK_SAMPLES: Final = 10
_MASK_STRENGTH: Final = 0.5


def _read(asked: Asked) -> DiffEdit:
    message, reader, fields = asked.request.diffedit, asked.reader, asked.reader.fields
    if message.HasField("mask"):
        for descriptor, _ in message.ListFields():
            if descriptor.name != "mask":
                fields.wrong(f"diffedit.{descriptor.name}", "unused: a mask is given")
    threshold = message.threshold if message.HasField("threshold") else _THRESHOLD
    mask_strength = message.mask_strength if message.HasField("mask_strength") else _MASK_STRENGTH
    return DiffEdit(
        mask=None,
        threshold=fields.share("diffedit.threshold", threshold, below_one=True),
        samples=fields.count("diffedit.samples", message.samples, _MASK_SAMPLES, reader.limits.max_mask_samples),
        mask_strength=fields.share("diffedit.mask_strength", mask_strength, below_one=True),
        reference_prompt=reader.prompt("diffedit.reference_prompt", message.reference_prompt),
    )


def _write(request: EditRequest, options: DiffEdit) -> None:
    message = request.diffedit
    if options.mask is not None:
        message.mask.CopyFrom(images.encode(options.mask))
        return
    message.threshold = options.threshold
    message.samples = options.samples
    message.mask_strength = options.mask_strength
    message.reference_prompt = options.reference_prompt


METHOD = Method(
    options=DiffEdit,
    read=_read,
    write=_write,
    inversion="ddim",
    encodes_drawn=True,
    guidance_scale=5.0,
    mask="mask",
)
