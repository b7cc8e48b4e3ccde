"""From results to response messages, and from errors to statuses."""

from underpaint_server.rpc.responses.common import file_chunks, notices, progress, server_timing, usage
from underpaint_server.rpc.responses.edit import edited, masked, preview
from underpaint_server.rpc.responses.inversion import inversion

__all__ = ["edited", "file_chunks", "inversion", "masked", "notices", "preview", "progress", "server_timing", "usage"]
