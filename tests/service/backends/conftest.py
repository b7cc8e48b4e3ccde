"""The embedded model in this process: read and measured once for all tests that leave it as it was."""

import pytest
from underpaint_server.backends import load
from underpaint_server.backends.torch_ import TorchBackend
from underpaint_server.settings import Settings


def embedded_model(dtype: str) -> TorchBackend:
    """The embedded model in that number format."""
    backend = load("", "mini", Settings(dtype=dtype))
    assert isinstance(backend, TorchBackend)
    return backend


@pytest.fixture(scope="session")
def embedded() -> TorchBackend:
    """In float32."""
    return embedded_model("float32")


@pytest.fixture(scope="session")
def bfloat16() -> TorchBackend:
    """In bfloat16."""
    return embedded_model("bfloat16")
