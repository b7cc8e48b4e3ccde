"""The decoder seen from the front process: one process an image, limited in time and memory, and few at once."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import astuple
from typing import Any, Final

import numpy as np
import structlog

from underpaint_server.cores import cpu_seconds, usable_cores
from underpaint_server.decoder import ACCEPTED, ENDED, OUT_OF_MEMORY
from underpaint_server.errors import (
    FieldInvalid,
    FieldViolation,
    ImageTooLarge,
    ImageUndecodable,
    UnderpaintError,
    WorkerRestarted,
)
from underpaint_server.jobs import Picture
from underpaint_server.signals import stop_signals_blocked
from underpaint_server.wire.fitting import Canvas, Fitting
from underpaint_server.wire.headers import IMAGE, JPEG, MASK, PNG, WEBP, Header, ImageLimits, too_large

LARGE_PX: Final = 4 * 1024 * 1024
"""Images of more pixels than this are large. Three quarters of the memory is for them, a quarter for small ones, so
that neither waits for the other."""

_BASE_BYTES: Final = 64 * 1024 * 1024
_BYTES_PER_PIXEL: Final = {PNG: 12, JPEG: 14, WEBP: 24}
"""The most that decoding, turning and converting was seen to take, and a fifth more."""
_CPU_S: Final = 0.5
_CPU_S_PER_PIXEL: Final = 0.5e-6
"""Ten times what the slowest good file was seen to take."""
_MOST_AREA: Final = 4
"""A fitted image has at most this many times the pixels of the model's size."""
_HEAD_BYTES: Final = 65536
"""Room for what an answer has besides pixels."""
_STOP_S: Final = 2.0
_RETRY_S: Final = 1.0
FROZEN_S: Final = 10.0
"""Seconds without any CPU time after which a host that has tasks to accept is replaced: it was stopped."""
_LOOK_S: Final = 0.5

_ENDED: Final = re.compile(ENDED + rb"(-?\d+)\n\Z")
_OUT_OF_MEMORY: Final = (OUT_OF_MEMORY, -signal.SIGKILL)
_OUT_OF_TIME: Final = (-signal.SIGPROF, -signal.SIGALRM)
_ERRORS: Final[dict[str, type[UnderpaintError]]] = {kind.reason: kind for kind in (ImageUndecodable, ImageTooLarge)}

_log = structlog.get_logger()


class Share:
    """Hands out parts of a total, in the order in which they were asked for."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._left = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def part(self, amount: int) -> AsyncIterator[int]:
        """Wait for ``amount``, or for the total if that is less, and hold it; the value is what is held."""
        amount = min(amount, self.total)
        if self._waiting or amount > self._left:
            await self._wait(amount)
        else:
            self._left -= amount
        try:
            yield amount
        finally:
            self._give_back(amount)

    async def _wait(self, amount: int) -> None:
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, granted))
        try:
            await granted
        except asyncio.CancelledError:
            self._give_back(0 if granted.cancelled() else amount)
            raise

    def _give_back(self, amount: int) -> None:
        self._left += amount
        while self._waiting:
            amount, granted = self._waiting[0]
            if not granted.done():
                if amount > self._left:
                    return
                self._left -= amount
                granted.set_result(None)
            self._waiting.popleft()


class Decoder:
    """Decodes images, each in a process that ends when it exceeds its limits or when its caller has left.

    ``memory_bytes`` is what all these processes may take together. The host of the processes is started by
    :meth:`start` or with the first image, and again if it ended. It ends with the thread that started it.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._large = Share(memory_bytes * 3 // 4)
        self._small = Share(memory_bytes // 4)
        self._cores = max(2, usable_cores())
        self._host: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._cpu_s: float | None = None
        self._cpu_since = 0.0

    async def picture(
        self, content: bytes, header: Header, limits: ImageLimits, fit: int, canvas: Canvas
    ) -> tuple[Picture, Fitting]:
        """The fitted pixels (height, width, 3) uint8 of an image with this header, and how it was fitted.

        ``fit`` is a value of ``underpaint.v1.Fit``. Raises ImageUndecodable, ImageTooLarge, WorkerRestarted.
        """
        sizes = canvas.width, canvas.height, canvas.size_multiple
        task = {"what": IMAGE, "fit": fit, "canvas": sizes, "mask_of": ()}
        return await self._decode(content, header, limits, task, _MOST_AREA * 3 * canvas.width * canvas.height)

    async def mask(self, content: bytes, header: Header, limits: ImageLimits, fitting: Fitting, path: str) -> Picture:
        """The mask (height, width) uint8, 0 or 255, at the fitted size, of an image with this header.

        Raises FieldInvalid at ``path`` for another size or mode, and what :meth:`picture` raises.
        """
        try:
            task = {"what": MASK, "mask_of": astuple(fitting)}
            mask, _ = await self._decode(content, header, limits, task, fitting.width * fitting.height)
        except _MaskInvalid as error:
            raise FieldInvalid(FieldViolation(path, error.description)) from None
        return mask

    @property
    def pid(self) -> int | None:
        """Process id of the host; None before it is started."""
        return None if self._host is None else self._host.pid

    def start(self) -> None:
        """Start the host, without waiting for it; if the system refuses it, the first image tries again."""
        try:
            self._start()
        except OSError as error:
            _log.warning("the process that decodes images cannot be started yet", error=str(error))

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)  # a host that accepts nothing must not stop the event loop
        with theirs, stop_signals_blocked():
            self._host = subprocess.Popen(
                [sys.executable, "-P", "-m", "underpaint_server.decoder.host"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # numpy's threads would not survive a fork
            )
        self._control = ours

    def close(self) -> None:
        """End the host and with it all processes."""
        control, self._control = self._control, None
        host, self._host = self._host, None
        if control is not None:
            control.close()
        if host is not None:
            try:
                host.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                host.kill()
                host.wait()

    async def _decode(
        self, content: bytes, header: Header, limits: ImageLimits, task: dict[str, Any], most_bytes: int
    ) -> tuple[Picture, Fitting]:
        """Have a task done; the pixels of its answer are at most ``most_bytes``."""
        share = self._large if header.pixels > LARGE_PX else self._small
        memory = _BASE_BYTES + 2 * len(content) + _BYTES_PER_PIXEL[header.kind] * header.pixels
        cpu_s = _CPU_S + _CPU_S_PER_PIXEL * header.pixels
        async with share.part(max(memory, share.total // self._cores)) as held:
            task |= {
                "kind": header.kind,
                "limits": astuple(limits),
                "bytes": len(content),
                "memory_bytes": min(memory, held),
                "cpu_s": cpu_s,
            }
            for _ in range(2):  # the host may have been killed, with all that ran in it
                answer = await self._ask(json.dumps(task).encode() + b"\n", content, most_bytes + _HEAD_BYTES)
                if (decoded := _read(answer, task)) is not None:
                    return decoded
        raise _ended()

    async def _ask(self, head: bytes, content: bytes, room: int) -> bytearray:
        """Send a task to a new process, and return what it sends back; the process ends with this call.

        Little more than ``room`` bytes are read, whatever became of the process.
        """
        loop, answer = asyncio.get_running_loop(), bytearray()
        with self._connect() as connection:
            connection.setblocking(False)
            if not await self._accepted(connection):
                return answer
            try:
                await loop.sock_sendall(connection, head)
                await loop.sock_sendall(connection, content)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it ended early, and the answer says how
            try:
                while len(answer) <= room and (part := await loop.sock_recv(connection, 1 << 18)):
                    answer += part
            except ConnectionResetError:
                pass
        return answer

    async def _accepted(self, connection: socket.socket) -> bool:
        """Wait until the host has accepted a task, or has ended; end a host that was stopped."""
        accepted = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(connection, len(ACCEPTED)))
        try:
            self._look()
            while not (await asyncio.wait((accepted,), timeout=_LOOK_S))[0]:
                self._look()
            return bool(accepted.result())
        except ConnectionResetError:
            return False
        finally:
            accepted.cancel()
            await asyncio.wait((accepted,))

    def _look(self) -> None:
        """Kill the host if it got no CPU time for :data:`FROZEN_S` seconds. Every task that it accepts takes some, so
        this counts from the first task that it did not accept, whether or not that caller still waits."""
        if self._host is None:
            return
        cpu_s, now = cpu_seconds(self._host.pid), time.monotonic()
        if cpu_s is None or cpu_s != self._cpu_s:
            self._cpu_s, self._cpu_since = cpu_s, now
        elif now - self._cpu_since >= FROZEN_S:
            _log.error("the process that decodes images makes no progress", pid=self._host.pid)
            self._host.kill()

    def _connect(self) -> socket.socket:
        """Our end of a socket pair; the other one is with the host, which forks a process for it."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:  # no descriptor is free: the host is not at fault
            raise _ended() from error
        with theirs:
            for _ in range(2):
                try:
                    if self._control is None:
                        self._start()
                    assert self._control is not None
                    socket.send_fds(self._control, [b"."], [theirs.fileno()])
                except OSError as error:  # the host has ended or accepts nothing, or no descriptor or process is free
                    _log.warning("the process that decodes images is started again", error=str(error))
                    if self._host is not None:
                        self._host.kill()
                    self.close()
                else:
                    return ours
        ours.close()
        raise _ended()


class _MaskInvalid(Exception):
    def __init__(self, description: str) -> None:
        super().__init__(description)
        self.description = description


def _read(answer: bytearray, task: dict[str, Any]) -> tuple[Picture, Fitting] | None:
    """What the answer says, or raise its error; None if the process was killed by no limit of its own."""
    end = answer.find(b"\n")
    if end > 0:
        head = json.loads(answer[:end])
        if "reason" in head:
            raise _error(head)
        shape = tuple(head["shape"])
        if len(answer) - end - 1 == int(np.prod(shape)):
            pixels = np.frombuffer(answer, np.uint8, offset=end + 1).reshape(shape)
            return pixels, Fitting(*head["fitting"])
    match = _ENDED.search(answer)
    if match is None:
        return None
    status, what = int(match[1]), task["what"]
    if status in _OUT_OF_MEMORY:
        raise _over(what, "bytes of memory", task["memory_bytes"])
    if status in _OUT_OF_TIME:
        raise _over(what, "seconds of CPU time", round(task["cpu_s"], 1))
    raise ImageUndecodable(f"{what} cannot be decoded as {task['kind']}: the library crashed")


def _over(what: str, unit: str, limit: float) -> ImageTooLarge:
    return too_large(f"decoding {what} takes too many {unit} for its size", unit, limit, f"more than {limit:.12g}")


def _ended() -> WorkerRestarted:
    return WorkerRestarted("there is no process now to decode images; retry in a second", retry_after_s=_RETRY_S)


def _error(head: dict[str, Any]) -> Exception:
    if head["reason"] == FieldInvalid.reason:
        return _MaskInvalid(head["message"])
    return _ERRORS[head["reason"]](head["message"], metadata=head["metadata"])
