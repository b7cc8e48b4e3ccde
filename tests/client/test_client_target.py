"""How a target may be written, and what is told about one where no server answers."""

import contextlib
import http.server
import socket
import sys
import threading
from pathlib import Path

import grpc
import pytest
from underpaint import errors
from underpaint._target import Target

TLS = Path(__file__).parent / "tls"
CERTIFICATE = (TLS / "certificate.pem").read_bytes()
"""Of localhost, signed by itself."""
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


def target(address, credentials=None, options=()):
    return Target(address, credentials, options, 10.0)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("localhost", "localhost:50051"),
        ("gpu-box.example", "gpu-box.example:50051"),
        ("gpu_box:1", "gpu_box:1"),
        ("127.0.0.1:65535", "127.0.0.1:65535"),
        ("::1", "[::1]:50051"),
        ("[::1]", "[::1]:50051"),
        ("[fe80::1%eth0]:7", "[fe80::1%eth0]:7"),
        ("dns:box", "dns:box:50051"),
        ("dns:///box", "dns:///box:50051"),
        ("dns://8.8.8.8/box:1", "dns://8.8.8.8/box:1"),
        ("ipv4:10.0.0.1,10.0.0.2:2", "ipv4:10.0.0.1:50051,10.0.0.2:2"),
        ("ipv6:[::1],[::2]:2", "ipv6:[::1]:50051,[::2]:2"),
        ("unix:relative.sock", "unix:relative.sock"),
        ("unix:/run/a b.sock", "unix:/run/a b.sock"),
        ("unix:///run/a.sock", "unix:///run/a.sock"),
        ("unix-abstract:name", "unix-abstract:name"),
        ("xds:///service", "xds:///service"),
    ],
)
def test_a_target_without_a_port_has_the_servers_own(written, meant):
    assert target(written).for_grpc == meant


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("http://localhost:50051", "write 'localhost:50051'"),
        ("HTTP://localhost:50051/", "write 'localhost:50051'"),
        ("https://box:443/path", "write 'box:443' instead, and for TLS pass credentials"),
        ("grpc://box", "write 'box'"),
        ("grpcs://box", "for TLS pass credentials"),
        ("tcp://box:1", "write 'box:1'"),
        ("http://", "write 'host:port'"),
        ("", "write host:port"),
        (":50051", "write host:port"),
        ("box:", "write host:port"),
        ("box:http", "write host:port"),
        ("box:0", "write host:port"),
        ("box:65536", "write host:port"),
        ("box:50051/", "write host:port"),
        ("user@box:1", "write host:port"),
        (" box:1", "write host:port"),
        ("box :1", "write host:port"),
        ("box:1\n", "write host:port"),
        ("unix:", "unix:/path"),
        ("unix://run/a.sock", "unix:/path"),
        ("dns://box:1", "write host:port"),
        ("box:1,other:1", "ipv4:ADDRESS:PORT,ADDRESS:PORT"),
        ("[::1", "write host:port"),
    ],
)
def test_what_cannot_be_a_target_is_refused_with_what_to_write(connect, written, advice):
    with pytest.raises(errors.WrongTarget) as told:
        connect(written).models()
    assert advice in told.value.message
    assert repr(written) in told.value.message


# --- nobody there -------------------------------------------------------------------------------------------------


def test_nobody_at_the_target_is_waited_for_no_longer_than_the_connect_timeout(connect):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        client = connect(f"127.0.0.1:{taken.getsockname()[1]}", connect_timeout=0.2)
        for _ in range(2):
            with pytest.raises(errors.ConnectionFailed, match=r"no server answers at 127\S+ within 0.2 s: .*refused"):
                client.models()


def test_what_grpc_says_of_an_address_is_written_as_people_do():
    reason = "connections to all backends failing; last error: UNKNOWN: ipv6:%5B::1%5D:1: Connection refused"
    assert target("::1").explained(reason) == "no server answers at ::1: ipv6:[::1]:1: Connection refused"
    assert target("::1").explained("upstream is down 100%5B") == "upstream is down 100%5B"


def test_a_server_that_accepts_and_says_nothing_is_told_as_such(connect):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = connect(f"127.0.0.1:{silent.getsockname()[1]}", connect_timeout=0.2)
        with pytest.raises(errors.ConnectionFailed, match=r"no server answers at .* check that it runs") as told:
            client.models()
    assert type(told.value) is errors.ConnectionFailed


def test_a_server_that_starts_within_the_connect_timeout_is_found(connect, server):
    server.stop()
    again = []
    start = threading.Timer(1, lambda: again.append(type(server)(server.target)))
    start.start()
    try:
        assert connect(server.target, connect_timeout=60).models()
    finally:
        start.join()
        again[0].stop()


PLAIN = "does not speak TLS"
UNTRUSTED = "not trusted"
OTHER_HOST = "is for another host"
NOT_GRPC = "is not a gRPC server"
UNKNOWN = "no host has the name"


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        # grpcio 1.85
        (
            "connections to all backends failing; last error: UNKNOWN: ipv4:127.0.0.1:1: Tls handshake failed "
            "(TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:100000f7:SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER: "
            "Invalid certificate verification context: OK",
            PLAIN,
        ),
        (
            "connections to all backends failing; last error: UNKNOWN: ipv4:127.0.0.1:1: Tls handshake failed "
            "(TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"
            "CERTIFICATE_VERIFY_FAILED: self signed certificate: OK",
            UNTRUSTED,
        ),
        (
            "connections to all backends failing; last error: UNKNOWN: ipv4:127.0.0.1:1: Custom verification check "
            "failed with error: UNAUTHENTICATED: Hostname Verification Check failed.",
            OTHER_HOST,
        ),
        (
            "connections to all backends failing; last error: UNAVAILABLE: ipv4:127.0.0.1:1: Failed parsing HTTP/2 "
            "(Expected SETTINGS frame as the first frame, got frame type 79)",
            NOT_GRPC,
        ),
        (
            "errors resolving box:1: [field:hostname lookup error:address lookup failed for box:1: "
            "Domain name not found]",
            UNKNOWN,
        ),
        # grpcio 1.62, and the system's resolver
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Ssl handshake failed "
            "(TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:100000f7:SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER",
            PLAIN,
        ),
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Peer name localhost is not in "
            "peer certificate",
            OTHER_HOST,
        ),
        (
            "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:127.0.0.1:1: Trying to connect an "
            "http1.x server (HTTP status 400)",
            NOT_GRPC,
        ),
        (
            "connections to all backends failing; last error: UNAVAILABLE: ipv4:127.0.0.1:1: Failed parsing HTTP/2",
            NOT_GRPC,
        ),
        (
            "DNS resolution failed for box:1: C-ares status is not ARES_SUCCESS qtype=A name=box is_balancer=0: "
            "Domain name not found",
            UNKNOWN,
        ),
        ("DNS resolution failed for box:1: getaddrinfo: Name or service not known", UNKNOWN),
        # what may pass by itself
        ("DNS resolution failed for box:1: C-ares status is not ARES_SUCCESS: Could not contact DNS servers", None),
        ("connections to all backends failing; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused", None),
        ("upstream connect error or disconnect/reset before headers", None),
    ],
)
def test_what_no_later_attempt_can_mend_is_known_by_its_text(reason, told):
    box = target("127.0.0.1:1", grpc.ssl_channel_credentials())
    if told is None:
        box.check(reason)
        return
    with pytest.raises(errors.WrongTarget, match=told) as wrong:
        box.check(reason)
    assert isinstance(wrong.value, errors.ConnectionFailed)
    assert "last error" not in wrong.value.message


@pytest.fixture
def secure(server):
    credentials = grpc.ssl_server_credentials([((TLS / "key.pem").read_bytes(), CERTIFICATE)])
    scripted = type(server)(credentials=credentials)
    yield scripted
    scripted.stop()


PATIENT = 3000.0
"""A connect timeout that no test outlives: what is told is told at once."""


def test_tls_against_plain_text_is_told_at_once(connect, server):
    client = connect(server.target, credentials=grpc.ssl_channel_credentials(), connect_timeout=PATIENT, timeout=9000)
    with pytest.raises(errors.WrongTarget, match="does not speak TLS: leave the credentials out"):
        client.models()


def test_plain_text_against_tls_is_told_at_once(connect, secure):
    client = connect(secure.target, connect_timeout=PATIENT, timeout=9000)
    with pytest.raises(errors.WrongTarget, match="speaks TLS: pass credentials"):
        client.models()


def test_tls_with_and_without_trust(connect, secure):
    port = secure.target.rpartition(":")[2]
    trusting = grpc.ssl_channel_credentials(root_certificates=CERTIFICATE)
    assert connect(f"localhost:{port}", credentials=trusting).models()
    with pytest.raises(errors.WrongTarget, match="is for another host"):
        connect(f"127.0.0.1:{port}", credentials=trusting, connect_timeout=PATIENT, timeout=9000).models()
    stranger = grpc.ssl_channel_credentials()
    with pytest.raises(errors.WrongTarget, match="not trusted"):
        connect(f"localhost:{port}", credentials=stranger, connect_timeout=PATIENT, timeout=9000).models()


def test_a_server_of_another_protocol_is_told_at_once(connect):
    with _http(http.server.BaseHTTPRequestHandler) as port:
        client = connect(f"127.0.0.1:{port}", connect_timeout=PATIENT, timeout=9000)
        with pytest.raises(errors.WrongTarget, match="is not a gRPC server: check the port"):
            client.models()


def test_a_host_that_does_not_exist_is_told_at_once(connect):
    try:
        socket.getaddrinfo("no-such-host.invalid", 1)
    except socket.gaierror as error:
        if error.errno != socket.EAI_NONAME:
            pytest.skip("no name server answers here")
    client = connect("no-such-host.invalid", connect_timeout=PATIENT, timeout=9000)
    with pytest.raises(errors.WrongTarget, match=r"no host has the name in no-such-host\.invalid"):
        client.models()


# --- sockets and proxies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slashes", ["", "//"])
def test_a_unix_socket_is_a_target(connect, server, tmp_path, photo, slashes, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    there = type(server)(f"unix:{tmp_path}/s")
    try:
        assert connect(f"unix:{slashes}{tmp_path}/s").edit(photo, "t").image.size == (8, 8)
    finally:
        there.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has them")
def test_an_abstract_socket_is_a_target(connect, server, tmp_path, photo):
    there = type(server)(f"unix-abstract:{tmp_path}")
    try:
        assert connect(there.target).edit(photo, "t").image.size == (8, 8)
    finally:
        there.stop()


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "ipv4:127.0.0.1", "dns:///localhost"])
def test_no_proxy_is_asked_for_this_machine(connect, server, monkeypatch, variable, host):
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    assert connect(f"{host}:{server.target.rpartition(':')[2]}", connect_timeout=PATIENT).models()


def test_an_error_behind_a_proxy_names_its_variable_and_no_password(connect, monkeypatch):
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            self.send_error(403)

    with _http(Refusing) as port:
        monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{port}")
        with pytest.raises(errors.ConnectionFailed) as told:
            connect("box.invalid", connect_timeout=0.5).models()
    assert f"through the proxy 127.0.0.1:{port} of the environment variable http_proxy" in told.value.message
    assert "add box.invalid to no_proxy" in told.value.message
    assert "secret" not in told.value.message


@pytest.mark.parametrize("proxy", ["me:secret@no-proxy.invalid:1/", "127.0.0.1:none", "[::1", "a@b@no-proxy.invalid"])
def test_a_proxy_that_cannot_be_one_is_told_as_that(connect, monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", f"http://{proxy}")
    with pytest.raises(errors.ConnectionFailed) as told:
        connect("box.invalid", connect_timeout=0.5).models()
    assert "no host has the name in box.invalid" not in told.value.message
    assert f"through the proxy {proxy.rpartition('@')[2].strip('/')} of" in told.value.message
    assert "secret" not in told.value.message


PROXY = {"http_proxy": "http://p:1"}


@pytest.mark.parametrize(
    ("host", "environment", "options", "proxy"),
    [
        ("box.example", {}, (), ""),
        ("box.example", PROXY, (), "http_proxy"),
        ("box.example", PROXY | {"https_proxy": "http://q:1"}, (), "https_proxy"),
        ("box.example", PROXY | {"grpc_proxy": ""}, (), ""),
        ("box.example", PROXY | {"no_proxy": "other, Example"}, (), ""),
        ("box.example", PROXY | {"no_proxy": "other"}, (), "http_proxy"),
        ("box.example", PROXY | {"no_proxy": "example", "no_grpc_proxy": "other"}, (), "http_proxy"),
        ("box.example", PROXY | {"no_proxy": "10.0.0.0/8"}, (), "http_proxy"),
        ("10.1.2.3", PROXY | {"no_proxy": "10.0.0.0/8"}, (), ""),
        ("box.example", PROXY, (("grpc.enable_http_proxy", 0),), ""),
        ("box.example", {"http_proxy": "p:1"}, (), ""),
        ("box.example", {"http_proxy": "socks5://p:1"}, (), ""),
        ("box.example", {"http_proxy": "http://"}, (), ""),
        ("box.example", {"http_proxy": "HTTP://p"}, (), "http_proxy"),
        ("[::ffff:127.0.0.1]", PROXY, (), ""),
    ],
)
def test_a_proxy_is_told_where_grpc_takes_one(monkeypatch, host, environment, options, proxy):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert target(host, options=options).proxy == proxy


@contextlib.contextmanager
def _http(handler):
    """The port of an HTTP server that writes no log."""
    quiet = type("Quiet", (handler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), quiet) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield httpd.server_port
        httpd.shutdown()
        thread.join()
