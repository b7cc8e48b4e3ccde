"""A server in a process of its own on this machine, for demonstrations, benchmarks and tests."""

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
_STOP_S = 150.0


class LocalServer:
    """``with LocalServer(dtype="bfloat16") as server: Client(server.target)``; free ports on loopback.

    Keyword arguments are settings by their Python names. Leaving the block sends SIGTERM and waits for the server to
    drain; a server that ended with another status than 0 raises :class:`RuntimeError` with the end of its log.
    """

    def __init__(self, *, wait_ready: bool = True, **settings: object) -> None:
        self._settings = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"} | settings
        self._wait_ready = wait_ready
        self._log = Path(tempfile.mkstemp(prefix="underpaint-", suffix=".log")[1])
        self._process: subprocess.Popen[bytes] | None = None
        self.target = ""
        """host:port of the gRPC port."""
        self.metrics_url = ""
        """Of the Prometheus page."""

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
            self.stop(signal.SIGKILL)  # nobody else will: a block that is not entered is not left
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
            raise RuntimeError(f"the server ended with status {code}:\n{tail}")

    def _wait(self) -> None:
        listening = self.wait_for("listening")
        self.target = listening["address"]
        self.metrics_url = f"http://{listening['metrics_address']}/metrics"
        if self._wait_ready:
            self.wait_for("ready")

    @property
    def pid(self) -> int:
        """Of the front process."""
        assert self._process is not None
        return self._process.pid

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal the server and wait for its end; its exit status."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(number)
        try:
            return self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def events(self) -> Iterator[dict[str, Any]]:
        """The log so far, one dictionary a line; lines that are no JSON (a crash's traceback) are left out."""
        for line in self._log.read_text(errors="replace").splitlines():
            try:
                parsed = json.loads(line)
            except ValueError:
                continue
            if isinstance(parsed, dict):
                yield parsed

    def wait_for(self, event: str, count: int = 1) -> dict[str, Any]:
        """The ``count``-th log line of that event, when it is there; raises :class:`RuntimeError` if it never comes."""
        assert self._process is not None
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            ended = self._process.poll() is not None
            lines = list(self.events())
            found = [line for line in lines if line.get("event") == event]
            if len(found) >= count:
                return found[count - 1]
            if ended or (event == "ready" and any(line.get("event") == "engine failed" for line in lines)):
                break
            time.sleep(0.02)
        raise RuntimeError(f"the server did not say '{event}':\n{self.tail()}")

    def tail(self, lines: int = 30) -> str:
        """The end of the log, for messages."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])


def main() -> int:
    """``python -m underpaint_server.local_server COMMAND...``: run a command beside a fresh server.

    The command finds the address in ``UNDERPAINT_TARGET``. The server takes its settings from ``UNDERPAINT_*`` too.
    """
    if len(sys.argv) < 2:
        print("usage: python -m underpaint_server.local_server COMMAND...", file=sys.stderr)
        return 2
    print("starting a server with the embedded model ...", file=sys.stderr)
    with LocalServer() as server:
        print(f"it listens on {server.target}", file=sys.stderr)
        return subprocess.call(sys.argv[1:], env={**os.environ, "UNDERPAINT_TARGET": server.target})


if __name__ == "__main__":
    raise SystemExit(main())
