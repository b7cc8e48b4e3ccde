"""The engine process: loads the models, then runs the loop until the front says stop or is gone.

Imported by the front to be named as the target of a spawned process, so nothing heavy may be imported at the top.
"""

import os
import queue
import signal
import threading
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from underpaint_server.engine.messages import LoadFailed, Ready, Stop
from underpaint_server.errors import Bug, UnderpaintError
from underpaint_server.settings import Settings
from underpaint_server.telemetry import configure_logging

if TYPE_CHECKING:
    from underpaint_server.backends.protocol import Backend
    from underpaint_server.engine.messages import Order


def main(pipe: Connection, settings: Settings) -> None:
    """Serve the configured models over ``pipe``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front decides when work ends
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging(settings.log_level)
    spin_briefly()
    try:
        backends, seconds = _load(settings)
    except UnderpaintError as error:
        pipe.send(LoadFailed(error))
        return
    except Exception as error:
        pipe.send(LoadFailed(Bug(f"{type(error).__name__}: {error}")))
        raise
    from underpaint_server.engine.loop import Engine

    inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, inbox), name="orders", daemon=True).start()
    pipe.send(Ready(tuple((backends[name].facts.info, seconds[name]) for name, _ in settings.model_locations)))
    Engine(backends, inbox, pipe.send, settings.max_batch_size, settings.learn_share).run()


def spin_briefly() -> None:
    """Say how this process's threads wait for each other; the OpenMP library reads it when torch loads it.

    Threads that spin starve each other as soon as anything else wants the cores; threads that never spin lose as much
    to being woken.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _load(settings: Settings) -> tuple[dict[str, "Backend"], dict[str, float]]:
    from underpaint_server.backends import load

    backends, seconds = {}, {}
    for name, place in settings.model_locations:
        begin = time.monotonic()
        backends[name] = load(place, name, settings)
        seconds[name] = time.monotonic() - begin
    return backends, seconds


def _receive(pipe: Connection, inbox: "queue.SimpleQueue[Order]") -> None:
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):  # the front is gone: so is everyone who waits
        inbox.put(Stop())
