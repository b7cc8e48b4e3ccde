"""Entry point of the engine process: load the models, then run the loop until the front process stops it or ends.

The front process imports this module to name :func:`main` as the target of the child, so no module-level import may
load torch.
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
from underpaint_server.telemetry import configure_logging, log_prints

if TYPE_CHECKING:
    from underpaint_server.backends.protocol import Backend
    from underpaint_server.engine.messages import Order


def main(pipe: Connection, settings: Settings) -> None:
    """Load the configured models and serve orders from ``pipe``; reports go back through it.

    If a model cannot be loaded, sends :class:`LoadFailed` and returns; errors outside the error tree are raised too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a signal to the process group drains: the front process ends us
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging(settings.log_level)
    log_prints()
    spin_briefly()
    try:
        backends, seconds = _load(settings)
    except UnderpaintError as error:
        pipe.send(LoadFailed(error))
        return
    except Exception:
        pipe.send(LoadFailed(Bug("internal error while the models were loaded; the server log has it")))
        raise
    from underpaint_server.engine.loop import Engine

    inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, inbox), name="orders", daemon=True).start()
    pipe.send(Ready(tuple((backends[name].facts.info, seconds[name]) for name, _ in settings.model_locations)))
    Engine(backends, inbox, pipe.send, settings.max_batch_size, settings.learn_share).run()


def spin_briefly() -> None:
    """Limit how long OpenMP threads of this process spin before they sleep; to be called before torch is imported.

    Sets ``GOMP_SPINCOUNT`` unless it or ``OMP_WAIT_POLICY`` is set. Threads that spin long slow each other down when
    the cores are shared; threads that never spin lose as much time to wake-ups.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _load(settings: Settings) -> tuple[dict[str, "Backend"], dict[str, float]]:
    from underpaint_server.backends import load

    backends, seconds = {}, {}
    for name, location in settings.model_locations:
        begin = time.monotonic()
        backends[name] = load(location, name, settings)
        seconds[name] = time.monotonic() - begin
    return backends, seconds


def _receive(pipe: Connection, inbox: "queue.SimpleQueue[Order]") -> None:
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):  # the front process ended, so nobody waits for a result
        inbox.put(Stop())
