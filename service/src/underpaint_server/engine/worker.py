"""Entry point of the engine process: import torch, wait for the order to load the models, then run the loop until the
front process stops it or ends.

The front process imports this module to name :func:`main` as the target of the child, so no module-level import may
load torch.
"""

import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import structlog

from underpaint_server import cache
from underpaint_server.engine.messages import Load, LoadFailed, Order, Ready, Report
from underpaint_server.errors import Bug, UnderpaintError, cause_of
from underpaint_server.settings import Settings
from underpaint_server.signals import end_with_parent
from underpaint_server.telemetry import configure_logging, log_prints

if TYPE_CHECKING:
    from underpaint_server.backends.protocol import Backend

log = structlog.get_logger(__name__)

AWAKE_S = 1.0
"""Longest time in seconds that the process sleeps. The front process sees by the process's CPU time that it was not
stopped, see :mod:`underpaint_server.dispatch.stall`."""
CAPS_FILE = "pass-sizes.json"
"""File in the cache directory with what was learned of the sizes of passes."""
ORPHANED = 3
"""Exit status after the front process has ended."""


def main(pipe: Connection, settings: Settings) -> None:
    """Import what the configured models need, and serve orders from ``pipe``; reports go back through it.

    The first order must be :class:`Load`; until it comes, the device is not touched. If no model can be loaded, sends
    :class:`LoadFailed` and returns. Ends at once when the front process ends, whatever it is doing.
    """
    end_with_parent()  # where the kernel cannot, _receive notices it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a signal to the process group drains: the front process ends us
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging(settings.log_level)
    log_prints()
    spin_briefly()
    inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, inbox), name="orders", daemon=True).start()
    report = _reporter(pipe)

    from underpaint_server.backends import preload
    from underpaint_server.engine.loop import Engine

    preload(settings)
    match inbox.get():
        case Load():
            backends, seconds, errors = _load(settings)
        case _:
            return
    if not backends:
        report(LoadFailed(errors))
        return
    report(Ready(tuple((backend.facts.info, seconds[name]) for name, backend in backends.items()), errors))
    kept = cache.directory(settings)
    caps_file = None if kept is None else kept / CAPS_FILE
    Engine(
        backends, inbox, report, settings.max_batch_size, settings.learn_share, caps_file=caps_file,
        reuse_bytes=settings.reuse_bytes,
    ).run()  # fmt: skip


def spin_briefly() -> None:
    """Limit how long OpenMP threads of this process spin before they sleep; to be called before torch is imported.

    Sets ``GOMP_SPINCOUNT`` unless it or ``OMP_WAIT_POLICY`` is set. Threads that spin long slow each other down when
    the cores are shared; threads that never spin lose as much time to wake-ups.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _load(settings: Settings) -> tuple[dict[str, "Backend"], dict[str, float], dict[str, UnderpaintError]]:
    """The backends of the models that can be served, the seconds that each took, and why the others cannot."""
    from underpaint_server.backends import load
    from underpaint_server.backends.protocol import DeviceLost

    backends, seconds, errors = {}, {}, {}
    for name, location in settings.model_locations:
        begin = time.monotonic()
        try:
            backends[name] = load(location, name, settings)
        except UnderpaintError as error:
            errors[name] = error
        except DeviceLost:
            raise
        except Exception:
            log.exception("internal error while a model was loaded", model=name)
            errors[name] = Bug("internal error while the model was loaded; the server log has it")
        if name in errors and (cause := cause_of(errors[name])):
            log.error("cause of a model's failure", model=name, cause=cause)
        seconds[name] = time.monotonic() - begin
    return backends, seconds, errors


def _receive(pipe: Connection, inbox: "queue.SimpleQueue[Order]") -> None:
    """Put the orders into ``inbox``; end the process when no more can come."""
    try:
        while True:
            if pipe.poll(AWAKE_S):
                inbox.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(ORPHANED)
    except Exception:
        log.exception("unreadable order from the front process")
        os._exit(1)


def _reporter(pipe: Connection) -> Callable[[Report], None]:
    """A function that sends reports; it ends the process when nobody reads them any more."""

    def report(message: Report) -> None:
        try:
            pipe.send(message)
        except OSError:
            os._exit(ORPHANED)

    return report
