"""Starts a server in a child process on this machine, for examples, benchmarks and tests."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_START_S = 240.0
"""Longest wait for a log line, in seconds."""
_STOP_S = 150.0
"""Longest wait for the server's exit before it is killed, in seconds."""
_LOOPBACK = "localhost,127.0.0.1,::1"


class LocalServer:
    """A server on free loopback ports: ``with LocalServer(dtype="bfloat16") as server: Client(server.target)``.

    Keyword arguments are settings by their Python names. Entering waits until the models are loaded, or with
    ``wait_ready=False`` until the port is open; raises :class:`RuntimeError` with the end of the log if the server
    fails first. Leaving sends SIGTERM and waits for the drain; raises :class:`RuntimeError` with the end of the log if
    the exit status is not 0 and the block raised nothing itself.
    """

    def __init__(self, *, wait_ready: bool = True, **settings: object) -> None:
        self._settings = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"} | settings
        self._wait_ready = wait_ready
        descriptor, log = tempfile.mkstemp(prefix="underpaint-", suffix=".log")
        os.close(descriptor)
        self._log = Path(log)
        self._process: subprocess.Popen[bytes] | None = None
        self.target = ""
        """Address of the gRPC port, HOST:PORT."""
        self.metrics_url = ""
        """URL of the Prometheus metrics."""

    def __enter__(self) -> Self:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in self._settings.items()]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "underpaint_server", *flags],
                stderr=log,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        try:
            self._wait()
        except BaseException:
            self.stop(signal.SIGKILL)  # __exit__ is not called when __enter__ raises
            self._log.unlink(missing_ok=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code = self.stop()
        tail = self.tail()
        self._log.unlink(missing_ok=True)
        if code != 0 and error is None:
            raise RuntimeError(f"the server exited with status {code}; its last log lines:\n{tail}")

    def _wait(self) -> None:
        listening = self.wait_for("listening")
        self.target = listening["address"]
        self.metrics_url = f"http://{listening['metrics_address']}/metrics"
        if self._wait_ready:
            self.wait_for("ready")

    @property
    def pid(self) -> int:
        """Process id of the front process."""
        assert self._process is not None
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """The environment for a program that calls the server: ``UNDERPAINT_TARGET`` is its address, and a proxy that
        the environment names is not used for this machine."""
        excluded = {}
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
            if name in os.environ or name != "no_grpc_proxy":  # gRPC reads this one instead of no_proxy where it is set
                excluded[name] = ",".join(filter(None, (os.environ.get(name), _LOOPBACK)))
        return {**os.environ, **excluded, "UNDERPAINT_TARGET": self.target}

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send signal ``number`` and wait for the server's exit; returns the exit status."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(number)
        try:
            return self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def events(self) -> Iterator[dict[str, Any]]:
        """The log lines so far, as dictionaries; lines that are not JSON, such as a traceback, are skipped."""
        for line in self._log.read_text(errors="replace").splitlines():
            try:
                parsed = json.loads(line)
            except ValueError:
                continue
            if isinstance(parsed, dict):
                yield parsed

    def wait_for(self, event: str, count: int = 1) -> dict[str, Any]:
        """Wait for the ``count``-th log line of ``event`` and return it.

        Raises :class:`RuntimeError` if the server ends first, if it takes over 240 s or, for "ready", if the models
        cannot be loaded.
        """
        assert self._process is not None
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            ended = self._process.poll() is not None
            lines = list(self.events())
            matches = [line for line in lines if line.get("event") == event]
            if len(matches) >= count:
                return matches[count - 1]
            if ended or (event == "ready" and any(line.get("event") == "engine failed" for line in lines)):
                break
            time.sleep(0.02)
        raise RuntimeError(f"the server did not log '{event}'; its last log lines:\n{self.tail()}")

    def tail(self, lines: int = 30) -> str:
        """The last ``lines`` lines of the log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])


def main() -> int:
    """``python -m underpaint_server.local_server COMMAND...``: run a command while a new server runs.

    The command has the environment of :attr:`LocalServer.environment`. Settings are read from the ``UNDERPAINT_*``
    variables. Returns the command's exit status.
    """
    if len(sys.argv) < 2:
        print("usage: python -m underpaint_server.local_server COMMAND...", file=sys.stderr)
        return 2
    print("starting a server ...", file=sys.stderr)
    with LocalServer() as server:
        print(f"the server listens on {server.target}", file=sys.stderr)
        return subprocess.call(sys.argv[1:], env=server.environment)


if __name__ == "__main__":
    raise SystemExit(main())
