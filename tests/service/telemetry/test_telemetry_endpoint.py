"""The metrics port serves scrapes whatever other connections do."""

import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry, Counter
from support.waiting import until
from underpaint_server.telemetry import endpoint


@pytest.fixture
def port() -> Iterator[int]:
    registry = CollectorRegistry()
    Counter("apples", "Apples.", registry=registry)
    with endpoint.serve_metrics(registry, "127.0.0.1", 0) as port:
        yield port


def scraped(port: int, host: str = "127.0.0.1") -> str:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics") as page:
        text: str = page.read().decode()
    return text


def threads() -> int:
    return sum("process_request" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("said", [b"", b"GET /metrics", b"GET /metrics HTTP/1.1\r\nHost: x\r\n"])
async def test_idle_connections_are_bounded_and_keep_nobody_out(port: int, said: bytes) -> None:
    with ExitStack() as stack:
        for _ in range(4 * endpoint.MAX_CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(said)
        assert "apples_total 0.0" in scraped(port)
        await until(lambda: threads() <= endpoint.MAX_CONNECTIONS)
    await until(lambda: threads() == 0)


async def test_a_connection_that_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr(endpoint._Handler, "timeout", 0.2)
    with socket.create_connection(("127.0.0.1", port)) as one:
        assert one.recv(1) == b""
    await until(lambda: threads() == 0)


def test_an_address_of_version_6_is_served() -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except (OSError, ValueError) as error:
        pytest.skip(f"no IPv6: {error}")
    with endpoint.serve_metrics(CollectorRegistry(), "::1", 0) as port:
        assert scraped(port, "[::1]") == ""


def test_a_port_that_is_taken_is_an_error(port: int) -> None:
    with pytest.raises(OSError, match="in use"), endpoint.serve_metrics(CollectorRegistry(), "127.0.0.1", port):
        pass
