"""Lines of text to a file descriptor, written on a thread of their own: who logs never waits, and never fails."""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

MAX_BYTES: Final = 4 * 1024 * 1024
"""Most bytes that wait to be written; further lines are dropped."""


class LineWriter:
    """A file to write whole lines to.

    Lines are dropped, and counted in ``dropped``, while too many wait (a reader that stopped reading) and when writing
    fails (the reader is gone, the disk is full). ``on_dropped`` gives the line that says how many
    they were; it is written when writing succeeds again and no line waits.
    """

    def __init__(self, descriptor: int, on_dropped: Callable[[int], str], max_bytes: int = MAX_BYTES) -> None:
        self.dropped = 0
        """Lines dropped so far."""
        self._descriptor = descriptor
        self._on_dropped = on_dropped
        self._max_bytes = max_bytes
        self._reported = 0
        self._torn = False
        self._bytes = 0
        self._lines: deque[bytes] = deque()
        self._changed = threading.Condition()  # reentrant: a finalizer may log while this thread is in write()
        threading.Thread(target=self._run, name="log lines", daemon=True).start()

    def write(self, text: str) -> int:
        """Take one or more whole lines; returns at once."""
        data = text.encode(errors="backslashreplace")
        with self._changed:
            if self._bytes + len(data) > self._max_bytes:
                self.dropped += 1
            else:
                self._lines.append(data)
                self._bytes += len(data)
                self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Does nothing: lines are written as soon as they can be. See :meth:`wait`."""

    def wait(self, timeout_s: float) -> None:
        """Wait until all lines are written or dropped, at most ``timeout_s`` seconds."""
        end = time.monotonic() + timeout_s
        with self._changed:
            while self._bytes and (left_s := end - time.monotonic()) > 0:
                self._changed.wait(left_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._lines:
                    self._changed.wait()
                data = self._lines.popleft()
            written = self._put(data)
            with self._changed:
                self.dropped += not written
                self._bytes -= len(data)
                self._changed.notify_all()
            if written and not self._lines and self.dropped > self._reported:
                dropped = self.dropped
                if self._put(self._on_dropped(dropped - self._reported).encode()):
                    self._reported = dropped

    def _put(self, data: bytes) -> bool:
        rest = memoryview(b"\n" + data if self._torn else data)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:  # whoever shares the descriptor has made it non-blocking
                    waiting = select.poll()
                    waiting.register(self._descriptor, select.POLLOUT)
                    waiting.poll()
                self._torn = True
        except OSError:
            return False
        self._torn = False
        return True
