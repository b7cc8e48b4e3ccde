"""The bodies of the calls that compute."""

from underpaint_server.rpc.handlers.run import compute_mask, edit, fingerprint, invert

__all__ = ["compute_mask", "edit", "fingerprint", "invert"]
