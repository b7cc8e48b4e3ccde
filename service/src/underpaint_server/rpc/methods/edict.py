"""The way back from an EDICT inversion on the wire: it has no options, and guides as the inversion did."""

from underpaint.v1.edit_service_pb2 import EditRequest

from underpaint_server.jobs import EdictEdit
from underpaint_server.rpc.method import Asked, Method


def _read(_asked: Asked) -> EdictEdit:
    return EdictEdit()


def _write(request: EditRequest, _options: EdictEdit) -> None:
    request.edict.SetInParent()


METHOD = Method(options=EdictEdit, read=_read, write=_write, inversion="edict", guidance_scale=None)
