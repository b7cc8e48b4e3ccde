"""SDEdit's message in EditRequest."""

from underpaint.v1.edit_service_pb2 import EditRequest

from underpaint_server.methods.message import DEFAULT_STRENGTH, Message, Reading
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.wire.drafts import EditSource


def _read(reading: Reading) -> SdEdit:
    message, reader = reading.request.sdedit, reading.reader
    strength = message.strength if message.HasField("strength") else DEFAULT_STRENGTH
    return SdEdit(
        strength=reader.fields.fraction("sdedit.strength", strength),
        num_inference_steps=reader.steps("sdedit.steps", message.steps),
    )


def _write(request: EditRequest, options: SdEdit, _source: EditSource) -> None:
    request.sdedit.strength, request.sdedit.steps = options.strength, options.num_inference_steps


MESSAGE = Message(read=_read, write=_write, guidance_scale=3.0)
