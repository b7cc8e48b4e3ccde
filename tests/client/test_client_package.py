"""The package as others see it: what it exports, what it loads, and that its generated half is up to date."""

import subprocess
import sys
from pathlib import Path

import pytest
import underpaint
from hypothesis import given
from hypothesis import strategies as st
from underpaint import _crc32c

ROOT = Path(__file__).resolve().parents[2]


def test_everything_public_is_in_all_and_nothing_else():
    public = {name for name in vars(underpaint) if not name.startswith("_")}
    modules = {"aio", "choices", "client", "images", "methods", "resources", "results", "v1"}  # not to import from
    assert set(underpaint.__all__) == (public - modules) | {"__version__"}
    assert underpaint.__all__ == sorted(underpaint.__all__)
    assert all(hasattr(underpaint, name) for name in underpaint.__all__)


def test_every_public_thing_is_documented():
    for name in underpaint.__all__:
        thing = getattr(underpaint, name)
        if isinstance(thing, type):
            assert thing.__doc__, name
            own = [value for key, value in vars(thing).items() if not key.startswith("_") and callable(value)]
            assert all(value.__doc__ for value in own), name


def _loaded(statement):
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("statement", ["import underpaint", "import underpaint.__main__"])
def test_importing_loads_nothing_heavy(statement):
    loaded = _loaded(statement)
    assert "grpc" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "PIL", "rich", "diffusers", "transformers", "pydantic"})


def test_both_clients_have_the_same_methods_with_the_same_arguments():
    import inspect

    for name, method in inspect.getmembers(underpaint.AsyncClient, inspect.isfunction):
        if not name.startswith("_"):
            other = getattr(underpaint.Client, name)
            assert list(inspect.signature(method).parameters) == list(inspect.signature(other).parameters)
            assert inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)
            assert not inspect.iscoroutinefunction(other)


def test_the_synchronous_client_is_what_the_asynchronous_one_gives():
    command = [sys.executable, str(ROOT / "client" / "make_sync.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_said_once():
    from importlib.metadata import version

    from underpaint._channel import OPTIONS

    assert underpaint.__version__ == version("underpaint")
    assert dict(OPTIONS)["grpc.primary_user_agent"] == f"underpaint-python/{underpaint.__version__}"


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],
)
def test_checksums_of_the_published_vectors(data, expected):
    assert _crc32c.extend(0, data) == expected


@given(st.binary(), st.binary())
def test_a_checksum_grows_with_its_data(first, second):
    assert _crc32c.extend(_crc32c.extend(0, first), second) == _crc32c.extend(0, first + second)
