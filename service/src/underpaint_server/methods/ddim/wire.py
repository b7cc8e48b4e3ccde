"""DDIM's messages in EditRequest and InversionParameters. The edit has no options."""

from typing import Final

from underpaint.v1 import inversion_service_pb2 as messages
from underpaint.v1.edit_service_pb2 import EditRequest

from underpaint_server.jobs import DdimConvention
from underpaint_server.methods.ddim.options import DdimEdit, DdimInversion
from underpaint_server.methods.message import InversionMessage, Message, Reading
from underpaint_server.wire.drafts import EditSource
from underpaint_server.wire.reader import Reader

_CONVENTIONS: Final = {
    DdimConvention.TARGET: messages.DDIM_CONVENTION_TARGET,
    DdimConvention.CURRENT: messages.DDIM_CONVENTION_CURRENT,
}
_CONVENTION_OF: Final = {message: convention for convention, message in _CONVENTIONS.items()}


def _read(_reading: Reading) -> DdimEdit:
    return DdimEdit()


def _write(request: EditRequest, _options: DdimEdit, _source: EditSource) -> None:
    request.ddim.SetInParent()


def _read_inversion(reader: Reader, parameters: messages.InversionParameters, path: str) -> DdimInversion:
    convention = parameters.ddim.convention
    reader.fields.known(f"{path}.ddim.convention", convention, messages.DdimConvention.DESCRIPTOR)
    features = reader.sites(f"{path}.ddim.features", parameters.ddim.features)
    return DdimInversion(_CONVENTION_OF.get(convention, DdimConvention.TARGET), features)


def _write_inversion(parameters: messages.InversionParameters, options: DdimInversion) -> None:
    parameters.ddim.convention = _CONVENTIONS[options.convention]
    parameters.ddim.features.extend(options.features)


MESSAGE = Message(read=_read, write=_write, guidance_scale=3.0)
INVERSION = InversionMessage(read=_read_inversion, write=_write_inversion)
