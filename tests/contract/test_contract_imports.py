"""What each process loads, which decides how fast it starts and what it can do with the device: nothing."""

import os
import subprocess
import sys

import pytest

CODE = "import sys; import {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
NETWORKS = {"torch", "diffusers", "transformers", "accelerate", "onnxruntime"}


def loaded_by(module: str) -> set[str]:
    """Top-level packages in a fresh process after one import."""
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = (sys.executable, "-c", CODE.format(module=module))
    return set(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split())


@pytest.mark.parametrize(
    "module", ["underpaint_server.server", "underpaint_server.engine.worker", "underpaint_server.local_server"]
)
def test_the_front_never_loads_a_network(module: str) -> None:
    loaded = loaded_by(module)
    assert "underpaint_server" in loaded
    assert not loaded & NETWORKS


def test_nor_do_the_messages_of_the_methods() -> None:
    """They are loaded by name, when the first request of a method comes."""
    names = "[m.message_of(n) for n in METHODS], [m.inversion_message_of(n) for n in INVERSIONS]"
    code = f"underpaint_server.server; from underpaint_server.methods import METHODS, INVERSIONS, message as m; {names}"
    assert not loaded_by(code) & NETWORKS


def test_the_entry_point_of_the_engine_s_process_loads_no_sockets() -> None:
    assert not loaded_by("underpaint_server.__main__") & {*NETWORKS, "grpc", "obstore"}


def test_what_decodes_images_loads_nothing_else() -> None:
    loaded = loaded_by("underpaint_server.decoder.host")
    assert {"PIL", "numpy"} <= loaded
    assert not loaded & {*NETWORKS, "grpc", "google", "underpaint", "pydantic", "structlog", "asyncio"}


@pytest.mark.parametrize("module", ["underpaint", "underpaint.__main__", "underpaint.aio"])
def test_the_client_is_light(module: str) -> None:
    loaded = loaded_by(module)
    assert {"grpc", "google", "underpaint"} <= loaded
    assert not loaded & {*NETWORKS, "numpy", "underpaint_server", "rich", "pandas"}


def test_the_backend_is_what_loads_the_network() -> None:
    assert "torch" in loaded_by("underpaint_server.backends.toy")
