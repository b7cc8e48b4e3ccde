"""The decoder's host: a process that has the libraries loaded and forks a process of its own for each image.

``python -m underpaint_server.decoder.host``; standard input is a socket, over which the front process sends one end of
a socket pair an image. On that pair, the host says that it is there, the forked process gets a task (one line of JSON,
then the file's bytes) and sends its answer (one line of JSON, then pixels). If the front closes its end, the forked
process is killed. Of a forked process that ended without an answer, the host sends the exit status. The host has one
thread, keeps nothing of an image, and ends when the front does.
"""

import gc
import io
import json
import os
import resource
import select
import signal
import socket
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any, Final

import PIL.MpoImagePlugin  # noqa: F401  # Pillow would load it in every process that meets such a file
from PIL import Image
from PIL.ImageCms import ImageCmsProfile, createProfile

from underpaint_server.decoder import ACCEPTED, ENDED, OUT_OF_MEMORY, pixels
from underpaint_server.errors import FieldInvalid, UnderpaintError
from underpaint_server.jobs import Picture
from underpaint_server.signals import end_with_parent
from underpaint_server.wire.fitting import Fit, Fitting, fit_picture, plan
from underpaint_server.wire.headers import ImageLimits

_WALL_S: Final = 60.0
_WALL_PER_CPU: Final = 20.0
"""Seconds by the clock that a process may work, besides ``_WALL_S``, for each second of CPU time that it may use."""


@dataclass(frozen=True, slots=True)
class _Canvas:
    """Implements :class:`underpaint_server.wire.fitting.Canvas`."""

    width: int
    height: int
    size_multiple: int


class Host:
    """Forks, watches, kills and reaps; the front process sends the tasks' sockets over ``control``."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._signals, waker = os.pipe()
        for end in (self._signals, waker):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing is written to the pipe
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._poll.register(self._signals, select.POLLIN)
        self._tasks: dict[int, tuple[int, socket.socket]] = {}
        """The process id and the socket of each running task, by the socket's descriptor."""

    def run(self) -> None:
        """Serve until the front process ends; then kill what runs."""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._control.fileno():
                    if not self._accept():
                        return self._kill_all()
                elif descriptor == self._signals:
                    with suppress(BlockingIOError):
                        os.read(self._signals, 4096)
                elif descriptor in self._tasks:  # the front has closed its end
                    os.kill(self._tasks[descriptor][0], signal.SIGKILL)
                    self._poll.unregister(descriptor)
            self._reap()

    def _accept(self) -> bool:
        """Start a task; False when the front process has ended."""
        message, descriptors, _, _ = socket.recv_fds(self._control, 1, 1)
        if not message:
            return False
        connection = socket.socket(fileno=descriptors[0])
        try:
            connection.send(ACCEPTED, socket.MSG_DONTWAIT)
            pid = os.fork()
        except OSError:  # the caller has left, or no process or memory is free now
            connection.close()
            return True
        if pid == 0:
            self._in_child(connection)
        self._tasks[connection.fileno()] = (pid, connection)
        self._poll.register(connection, 0)
        return True

    def _in_child(self, connection: socket.socket) -> None:
        status = 1
        try:
            end_with_parent()
            signal.set_wakeup_fd(-1)
            # The front sees the end of an answer only when no process has that socket open.
            for other in (self._control, *(other for _, other in self._tasks.values())):
                other.close()
            # Where there is such a thing: the kernel, short of memory, ends this process before any other.
            with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
                score.write("1000")
            serve(connection)
            status = 0
        except MemoryError:
            status = OUT_OF_MEMORY
        finally:
            os._exit(status)

    def _reap(self) -> None:
        for descriptor, (pid, connection) in list(self._tasks.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            if status:
                with suppress(OSError):
                    connection.send(ENDED + b"%d\n" % os.waitstatus_to_exitcode(status), socket.MSG_DONTWAIT)
            with suppress(KeyError):
                self._poll.unregister(descriptor)
            del self._tasks[descriptor]
            connection.close()

    def _kill_all(self) -> None:
        for pid, _ in self._tasks.values():
            os.kill(pid, signal.SIGKILL)


def serve(connection: socket.socket) -> None:
    """Do the one task that comes over this connection. Raises MemoryError at the task's limit."""
    with connection.makefile("rb") as reader:
        task = json.loads(reader.readline())
        _limit_memory(task["memory_bytes"])
        content = reader.read(task["bytes"])
    _limit_time(task["cpu_s"])
    head, data = answer(task, content)
    _limit_time(0)  # the front may be slow to read
    connection.sendall(json.dumps(head).encode() + b"\n")
    connection.sendall(data)


def _limit_memory(memory_bytes: int) -> None:
    with suppress(OSError), open("/proc/self/statm") as statm:  # elsewhere only the limits of the header hold
        now = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory_bytes, now + memory_bytes))


def _limit_time(cpu_s: float) -> None:
    """End this process after so much CPU time, also in the middle of a library's loop; 0 for no limit."""
    wall_s = _WALL_S + _WALL_PER_CPU * cpu_s if cpu_s else 0.0
    for timer, number, seconds in (
        (signal.ITIMER_PROF, signal.SIGPROF, cpu_s),
        (signal.ITIMER_REAL, signal.SIGALRM, wall_s),
    ):
        signal.signal(number, signal.SIG_DFL)  # which is the end of the process
        signal.setitimer(timer, seconds)


def answer(task: Mapping[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    """The head and the pixels that a task is answered with, whatever the bytes of its image are.

    Raises MemoryError.
    """
    what, kind = task["what"], task["kind"]
    try:
        image = pixels.load(content, kind, ImageLimits(*task["limits"]), what)
        with pixels.decoding(what, kind):
            picture, record = _fitted(image, task)
    except FieldInvalid as error:
        return {"reason": error.reason, "message": error.violations[0].description, "metadata": {}}, b""
    except UnderpaintError as error:
        return {"reason": error.reason, "message": error.message, "metadata": error.metadata}, b""
    return {"shape": picture.shape, "fitting": astuple(record)}, picture.tobytes()


def _fitted(image: Any, task: Mapping[str, Any]) -> tuple[Picture, Fitting]:
    if task["mask_of"]:
        record = Fitting(*task["mask_of"])
        return pixels.mask(image, record, ""), record
    record = plan(task["fit"], image.size, _Canvas(*task["canvas"]))
    return fit_picture(pixels.rgb(image), record), record


def _warm_up() -> None:
    """Decode an image of each type once: what is loaded for it now need not be loaded in every forked process."""
    for kind, name in pixels.FORMATS.items():
        file = io.BytesIO()
        Image.new("RGB", (16, 8)).save(file, name, icc_profile=ImageCmsProfile(createProfile("sRGB")).tobytes())
        image = pixels.rgb(pixels.load(file.getvalue(), kind, ImageLimits(len(file.getvalue()), 1000, 2), "the image"))
        fit_picture(image, plan(Fit.FIT_CROP, image.size, _Canvas(8, 8, 8)))


def main() -> None:
    """Run the host on the socket that is standard input."""
    end_with_parent()  # also while it is stopped
    for number in (signal.SIGINT, signal.SIGTERM):  # those to the process group drain: the front process ends this one
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")  # Pillow's warnings have text from the file
    control = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    _warm_up()
    gc.freeze()
    Host(control).run()


if __name__ == "__main__":
    main()
