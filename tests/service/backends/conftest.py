"""The embedded model in this process: read and measured once for all tests that leave it as it was."""

import pytest
from underpaint_server.backends import load
from underpaint_server.backends.model import ModelBackend
from underpaint_server.settings import Settings


def embedded_model(dtype: str) -> ModelBackend:
    """The embedded model in that number format."""
    backend = load("", "mini", Settings(dtype=dtype))
    assert isinstance(backend, ModelBackend)
    return backend


@pytest.fixture(scope="session")
def embedded() -> ModelBackend:
    """In float32."""
    return embedded_model("float32")


@pytest.fixture(scope="session")
def bfloat16() -> ModelBackend:
    """In bfloat16."""
    return embedded_model("bfloat16")
