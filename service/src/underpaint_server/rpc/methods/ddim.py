"""The way back from a DDIM inversion on the wire: it has no options."""

from underpaint.v1.edit_service_pb2 import EditRequest

from underpaint_server.jobs import DdimEdit
from underpaint_server.rpc.method import Asked, Method


def _read(_asked: Asked) -> DdimEdit:
    return DdimEdit()


def _write(request: EditRequest, _options: DdimEdit) -> None:
    request.ddim.SetInParent()


METHOD = Method(options=DdimEdit, read=_read, write=_write, inversion="ddim", guidance_scale=3.0)
