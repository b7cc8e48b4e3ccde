"""LitServe and mosec as processes: their environment, their start, their end, and a call over HTTP."""

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers.edits import Edit, make
from benchmarks.peers.lockstep import Work
from benchmarks.peers.networks import CACHE
from benchmarks.report import console

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements" / "peers.txt"
_ENVIRONMENT = CACHE / "venv"
_START_S, _STOP_S = 600.0, 20.0


@dataclass(frozen=True, slots=True)
class Framework:
    """A serving framework, and how its server is started."""

    name: str
    module: str
    path: str
    """Path of its URL that takes requests."""

    def command(self, port: int) -> list[str]:
        """The module and its arguments."""
        arguments = [str(port)] if self.name == "LitServe" else ["--address", "127.0.0.1", "--port", str(port)]
        return ["-m", self.module, *arguments]


FRAMEWORKS = (
    Framework("LitServe", "benchmarks.peers.behind_litserve", "/predict"),
    Framework("mosec", "benchmarks.peers.behind_mosec", "/inference"),
)


class Unavailable(Exception):
    """The other frameworks cannot be run here; the message says why."""


def environment() -> Path:
    """The Python of an environment with the other frameworks, made if need be; raises :class:`Unavailable`.

    It holds only the frameworks and what they need. The network's libraries are those of this process, see
    :class:`Batcher`, so that every contender runs the same ones.
    """
    python, done = _ENVIRONMENT / "bin" / "python", _ENVIRONMENT / "installed"
    wanted = sha256(LOCK.read_bytes() + sys.version.encode()).hexdigest()
    if done.exists() and done.read_text() == wanted:
        return python
    console.print("making the environment of LitServe and mosec")
    try:
        venv.create(_ENVIRONMENT, clear=True, with_pip=True)
    except subprocess.CalledProcessError as error:
        raise Unavailable("the environment of LitServe and mosec cannot be made: Python's ensurepip fails") from error
    install = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "--retries", "1", "--no-deps"]
    command = [str(python), *install, "--require-hashes", "-r", str(LOCK)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        last = next((line for line in reversed(ended.stderr.splitlines()) if line.strip()), "no message")
        raise Unavailable(f"LitServe and mosec cannot be installed here ({last.strip()[:200]})")
    done.write_text(wanted)
    return python


class Batcher:
    """A framework's server in processes of its own, on a free loopback port, while entered.

    Entering waits until it has answered one request; raises :class:`Unavailable` with the end of its log if it ends
    before, or takes more than ten minutes.
    """

    def __init__(self, framework: Framework, python: Path) -> None:
        self.name = framework.name
        self.work = Work()
        """What its worker has computed, as of the last answer."""
        self._framework, self._python = framework, python

    def __enter__(self) -> Self:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        descriptor, log = tempfile.mkstemp(prefix="underpaint-peer-", suffix=".log")
        self._log = Path(log)
        paths = [str(ROOT), *(path for path in sys.path if path)]
        self._process = subprocess.Popen(
            [self._python.absolute(), *self._framework.command(self._port)],
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
            env=_variables(paths),
        )
        os.close(descriptor)
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    async def edit(self, edit: Edit) -> bytes:
        """The edited picture as PNG; raises OSError if the server answers with anything else."""
        answer = await _post(self._port, self._framework.path, edit.to_json())
        work = Work(**answer["work"])
        if work.passes >= self.work.passes:
            self.work = work
        return base64.b64decode(answer["image"])

    def _wait(self) -> None:
        end = time.monotonic() + _START_S
        while True:
            try:
                asyncio.run(self.edit(make("sdedit", 0, 1, 1.0)))
            except (OSError, ValueError):
                if self._process.poll() is not None or time.monotonic() > end:
                    tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
                    raise Unavailable(f"{self.name} did not start; the end of its log:\n{tail}") from None
                time.sleep(0.2)
            else:
                return

    def _stop(self) -> None:
        """End all its processes: they are the group of the one that was started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(_STOP_S)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()
        self._log.unlink(missing_ok=True)


def _variables(paths: list[str]) -> dict[str, str]:
    """Environment of a framework's server. Its threads spin as briefly as those of our server's engine."""
    waits = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": "2000"}
    limits = {"MOSEC_TIMEOUT": "3600000"}  # milliseconds
    return {**waits, **os.environ, **limits, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


async def _post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send JSON, read JSON; raises OSError for a status other than 200."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        status = (await reader.readline()).split(b" ", 2)
        length = 0
        while (line := await reader.readline()).strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        answered = await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        raise OSError("the connection was closed in the middle of an answer") from error
    finally:
        writer.close()
    if len(status) < 2 or status[1] != b"200":
        raise OSError(f"HTTP {b' '.join(status).decode(errors='replace').strip()}: {answered[:200]!r}")
    parsed: dict[str, Any] = json.loads(answered)
    return parsed
