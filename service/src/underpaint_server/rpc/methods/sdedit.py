"""SDEdit on the wire."""

from underpaint.v1.edit_service_pb2 import EditRequest

from underpaint_server.jobs import SdEdit
from underpaint_server.rpc.method import Asked, Method
from underpaint_server.rpc.parameters import STRENGTH


def _read(asked: Asked) -> SdEdit:
    message, reader = asked.request.sdedit, asked.reader
    strength = message.strength if message.HasField("strength") else STRENGTH
    return SdEdit(
        strength=reader.fields.share("sdedit.strength", strength),
        num_inference_steps=reader.steps("sdedit.steps", message.steps),
    )


def _write(request: EditRequest, options: SdEdit) -> None:
    request.sdedit.strength, request.sdedit.steps = options.strength, options.num_inference_steps


METHOD = Method(options=SdEdit, read=_read, write=_write, guidance_scale=3.0)
