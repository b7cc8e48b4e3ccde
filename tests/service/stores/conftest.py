"""The three kinds of place, each the real thing: memory, a directory, and an S3 server on a socket."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of its own."""
    bucket = "b" + tmp_path.name.replace("_", "-").replace("[", "-").replace("]", "").lower()[:60].rstrip("-")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT": s3_endpoint,
    }.items():
        monkeypatch.setenv(name, value)
    with urllib.request.urlopen(urllib.request.Request(f"{s3_endpoint}/{bucket}", method="PUT")) as answer:
        assert answer.status == 200
    return f"s3://{bucket}/some/prefix"


@pytest.fixture
def file_url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/a%20store"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the store of ``file_url`` keeps its objects."""
    return tmp_path / "a store" / "inversions"


@pytest.fixture(params=["file", "s3"])
def shared_url(request: pytest.FixtureRequest) -> str:
    """A place that outlives a store object, and that several may share."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    return "memory:///" if request.param == "memory" else str(request.getfixturevalue(f"{request.param}_url"))
