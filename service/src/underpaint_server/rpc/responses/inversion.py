"""Stored inversions as messages."""

from underpaint.v1 import inversion_service_pb2

from underpaint_server.rpc.requests.inversion import inversion_parameters
from underpaint_server.rpc.responses.common import fitting, timestamp
from underpaint_server.stores import Entry
from underpaint_server.wire.fitting import Fitting
from underpaint_server.wire.names import inversion_name, model_name


def inversion(identifier: str, entry: Entry, fitted: Fitting | None = None) -> inversion_service_pb2.Inversion:
    """A stored inversion as a message; ``fitted`` is the fitting of the request's own image, if it has one."""
    stored = entry.inversion
    return inversion_service_pb2.Inversion(
        name=inversion_name(identifier),
        model=model_name(stored.model),
        parameters=inversion_parameters(stored.options),
        width=stored.width,
        height=stored.height,
        reconstruction_psnr_db=stored.reconstruction_psnr_db,
        reconstruction_max_abs_error=stored.reconstruction_max_abs_error,
        size_bytes=entry.size_bytes,
        create_time=timestamp(entry.create_time.timestamp()),
        expire_time=timestamp(entry.expire_time.timestamp()),
        fitting=fitting(fitted or Fitting(**entry.fitting)),
    )
