"""EDICT's messages in EditRequest and InversionParameters.

The edit has no options; its default guidance scale is that of the inversion.
"""

from underpaint.v1.edit_service_pb2 import EditRequest
from underpaint.v1.inversion_service_pb2 import InversionParameters

from underpaint_server.methods.edict.options import EdictEdit, EdictInversion
from underpaint_server.methods.message import InversionMessage, Message, Reading
from underpaint_server.wire.drafts import EditSource
from underpaint_server.wire.reader import Reader


def _read(_reading: Reading) -> EdictEdit:
    return EdictEdit()


def _write(request: EditRequest, _options: EdictEdit, _source: EditSource) -> None:
    request.edict.SetInParent()


def _read_inversion(reader: Reader, parameters: InversionParameters, path: str) -> EdictInversion:
    message = parameters.edict
    if not message.HasField("mixing_coefficient"):
        return EdictInversion()
    return EdictInversion(reader.fields.fraction(f"{path}.edict.mixing_coefficient", message.mixing_coefficient))


def _write_inversion(parameters: InversionParameters, options: EdictInversion) -> None:
    parameters.edict.mixing_coefficient = options.mixing_coefficient


MESSAGE = Message(read=_read, write=_write, guidance_scale=None)
INVERSION = InversionMessage(read=_read_inversion, write=_write_inversion)
