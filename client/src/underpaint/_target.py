"""The address of the server: how it is written, the proxy on the way to it, and what is wrong with it."""

import ipaddress
import os
import re
import socket
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import grpc

from underpaint.errors import ConnectionFailed, WrongTarget

DEFAULT_PORT = 50051
_PROXY_VARIABLES = "grpc_proxy", "https_proxy", "http_proxy"  # gRPC takes the first that is set
_NO_PROXY_VARIABLES = "no_grpc_proxy", "no_proxy"
_PROXY = re.compile(r"http://(?:[^/?#]*@)?(?P<server>[^/?#@]+)", re.IGNORECASE)  # gRPC ignores any other
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<server>[^/?#]*)", re.IGNORECASE)
_HOSTS = re.compile(r"(?P<prefix>(?:dns|ipv4|ipv6):(?://[^/]*/)?)?(?P<servers>.*)", re.DOTALL)
_SOCKETS = re.compile(r"unix-abstract:.+|unix:///.+|unix:(?!//).+", re.DOTALL)
_OTHER = re.compile(r"(?:vsock|xds|google-c2p):.+", re.DOTALL)
_SERVER = re.compile(
    r"(?:\[(?P<bracketed>[0-9a-f:.]+(?:%\w+)?)\]|(?P<host>[^\s:/?#@\[\],]+))(?::(?P<port>\d+))?", re.IGNORECASE
)

# gRPC has no codes for why a connection failed, only texts. The tests have those of several versions.
_NOT_CONNECTED = (
    "failed to connect to all addresses",
    "connections to all backends failing",
    "errors resolving",
    "resolution failed",
)
_LAST_ERROR = re.compile(r".*last error: (?:[A-Z_]+: )?", re.DOTALL)
_UNKNOWN_HOST = (
    "domain name not found",
    "misformatted domain name",
    "name or service not known",
    "nodename nor servname",
    "no such host is",
)
_WRONG: tuple[tuple[tuple[str, ...], str], ...] = (
    (_UNKNOWN_HOST, "no host has the name in {address}: check the target"),
    (("wrong_version_number",), "{address} does not speak TLS: leave the credentials out, or check the port"),
    (
        ("certificate_verify_failed",),
        "the certificate of {address} is not trusted: pass that of its authority,"
        " credentials=grpc.ssl_channel_credentials(root_certificates=...)",
    ),
    (
        ("hostname verification check failed", "is not in peer certificate"),
        "the certificate of {address} is for another host: use a name that the certificate has",
    ),
    (
        ("failed parsing http/2", "expected settings frame", "http1.x server"),
        "{address} is not a gRPC server: check the port (the metrics of a server have one of their own)",
    ),
)
_MAYBE_TLS = "socket closed", "connection reset", "end of tcp stream", "http/2", "settings frame", "http1.x server"
_TLS_CHECK_S = 2.0


@dataclass(frozen=True)
class Target:
    """Address of the server, and how to connect to it. Raises WrongTarget for an address that cannot be one."""

    address: str
    """As the caller wrote it."""
    credentials: grpc.ChannelCredentials | None
    options: Sequence[tuple[str, Any]]
    """The caller's channel options."""
    connect_timeout: float
    """Seconds to wait for the first connection."""

    def __post_init__(self) -> None:
        _ = self._parsed

    @property
    def for_grpc(self) -> str:
        """The address for gRPC, with a port for every host."""
        return self._parsed[0]

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine: a socket, or a loopback address."""
        return all(_is_loopback(host) for host, _ in self._servers)

    @property
    def proxy(self) -> str:
        """The environment variable that names the proxy to the server; empty without one."""
        return self._proxy[0]

    @cached_property
    def _proxy(self) -> tuple[str, str]:
        """The variable, and the address of the proxy without its password."""
        if self.is_local or not dict(self.options).get("grpc.enable_http_proxy", 1):
            return "", ""
        variable = next((name for name in _PROXY_VARIABLES if name in os.environ), "")
        excluded = next((os.environ[name] for name in _NO_PROXY_VARIABLES if name in os.environ), "")
        proxy = _PROXY.match(os.environ.get(variable, ""))
        if proxy is None or all(_is_excluded(host, excluded) for host, _ in self._servers):
            return "", ""
        return variable, proxy["server"]

    def check(self, reason: str) -> None:
        """Raise WrongTarget if a connection failed for a reason that no later attempt can mend. May block for 2 s."""
        if self.credentials is None and not self.proxy and _has(reason, _MAYBE_TLS) and self._speaks_tls():
            raise self._wrong("{address} speaks TLS: pass credentials=grpc.ssl_channel_credentials()", reason)
        if self.proxy and _has(reason, _UNKNOWN_HOST):
            raise self._wrong("no host has the name of the proxy on the way to {address}", reason)
        for texts, message in _WRONG:
            if _has(reason, texts):
                raise self._wrong(message, reason)

    def explained(self, reason: str) -> str:
        """The message for a call without an answer: gRPC's own text, and what it does not say."""
        if not _has(reason, _NOT_CONNECTED):
            return reason
        return f"no server answers at {self.address}: {self._told(reason)}"

    def refusal(self, waited_s: float, reason: str) -> ConnectionFailed:
        """The error when no server was reached in this time."""
        why = self._told(reason) if reason else f"check that it runs, and the target{self._proxy_note}"
        return ConnectionFailed(f"no server answers at {self.address} within {waited_s:.3g} s: {why}")

    @property
    def _servers(self) -> list[tuple[str, int]]:
        return self._parsed[1]

    @cached_property
    def _parsed(self) -> tuple[str, list[tuple[str, int]]]:
        """The address for gRPC, and host and port of each server that it names."""
        if _SOCKETS.fullmatch(self.address):
            return self.address, []
        if _OTHER.fullmatch(self.address):
            return self.address, [("", 0)]
        url = _URL.match(self.address)
        if url is not None and url["scheme"].lower() not in ("dns", "ipv4", "ipv6", "unix"):
            secure = url["scheme"].lower() in ("https", "grpcs")
            tls = ", and for TLS pass credentials=grpc.ssl_channel_credentials()" if secure else ""
            raise WrongTarget(f"target {self.address!r} is a URL: write {url['server'] or 'host:port'!r} instead{tls}")
        match = _HOSTS.fullmatch(self.address)
        assert match is not None
        prefix, texts = match["prefix"] or "", match["servers"].split(",")
        servers = [self._server(text) for text in texts]
        if len(servers) > 1 and not prefix.startswith("ip"):
            raise WrongTarget(f"target {self.address!r}: several servers are written ipv4:ADDRESS:PORT,ADDRESS:PORT")
        joined = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in servers)
        return prefix + joined, servers

    def _server(self, text: str) -> tuple[str, int]:
        if text.count(":") > 1 and _is_address(text):
            text = f"[{text}]"
        match = _SERVER.fullmatch(text)
        port = int(match["port"] or DEFAULT_PORT) if match else 0
        if match is None or not 0 < port < 65536:
            raise WrongTarget(
                f"target {self.address!r} is not an address: write host:port, such as 'localhost:{DEFAULT_PORT}',"
                " or unix:/path of a socket"
            )
        return match["bracketed"] or match["host"], port

    def _speaks_tls(self) -> bool:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        for server in self._servers[:1]:
            try:
                with socket.create_connection(server, _TLS_CHECK_S) as raw, context.wrap_socket(raw):
                    return True
            except ssl.SSLError as error:
                return "ALERT" in (error.reason or "")  # it refuses this handshake, in TLS
            except OSError:
                return False
        return False

    def _wrong(self, message: str, reason: str) -> WrongTarget:
        return WrongTarget(f"{message.format(address=self.address)} ({self._told(reason)})")

    def _told(self, reason: str) -> str:
        return unquote(_LAST_ERROR.sub("", reason)) + self._proxy_note  # gRPC writes [::1] as %5B::1%5D

    @property
    def _proxy_note(self) -> str:
        if not self.proxy:
            return ""
        return (
            f"; the connection goes through the proxy {self._proxy[1]} of the environment variable {self.proxy}: unset"
            f" it, or add {self._servers[0][0] or 'the host'} to no_proxy"
        )


def _has(reason: str, texts: Iterable[str]) -> bool:
    return any(text in reason.lower() for text in texts)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    if _is_address(host):
        address = ipaddress.ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address
        return address.is_loopback or address.is_unspecified
    return host.lower() == "localhost" or host.lower().endswith(".localhost")


def _is_excluded(host: str, no_proxy: str) -> bool:
    return any(_matches(host, entry.strip()) for entry in no_proxy.split(",") if entry.strip())


def _matches(host: str, entry: str) -> bool:
    """As gRPC compares: an entry is the end of a name, or a network."""
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return host.lower().endswith(entry.lower())
