"""The engine process seen from the front process: spawn it, send orders, receive reports, end it."""

import asyncio
import multiprocessing
import queue
import threading
from collections.abc import Callable

import structlog

from underpaint_server.engine import worker
from underpaint_server.engine.messages import Order, Report, Stop
from underpaint_server.settings import Settings

log = structlog.get_logger(__name__)

STOP_S = 5.0
"""Seconds that the child has to exit after a :class:`Stop` order before it is killed."""


class EngineProcess:
    """One child process, started at once. To be made on a running event loop.

    ``on_report`` and ``on_exit`` (with the exit code) are called on that loop, with this object first. The child is
    spawned and not forked, because a fork would inherit gRPC's threads and sockets.
    """

    def __init__(
        self,
        settings: Settings,
        on_report: Callable[["EngineProcess", Report], None],
        on_exit: Callable[["EngineProcess", int | None], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_report = on_report
        self._on_exit = on_exit
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=worker.main, args=(child_pipe, settings), name="engine", daemon=True)
        self._process.start()
        child_pipe.close()
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="engine reports", daemon=True).start()
        threading.Thread(target=self._send, name="engine orders", daemon=True).start()

    @property
    def pid(self) -> int | None:
        """Process id of the child."""
        return self._process.pid

    def send(self, order: Order) -> None:
        """Enqueue an order without waiting; orders to a child that has ended are dropped."""
        self._orders.put(order)

    def kill(self) -> None:
        """Kill the child; ``on_exit`` is called afterwards."""
        self._process.kill()

    async def stop(self) -> None:
        """Ask the child to exit; kill it after :data:`STOP_S` seconds."""
        self.send(Stop())
        await asyncio.to_thread(self._process.join, STOP_S)
        self._process.kill()
        await asyncio.to_thread(self._process.join)

    def _send(self) -> None:
        # In a thread of its own: writing to a pipe whose reader hangs would block the event loop and its watchdog.
        try:
            while (order := self._orders.get()) is not None:
                self._pipe.send(order)
        except OSError:  # the child has ended, which _listen notices too
            return

    def _listen(self) -> None:
        try:
            while True:
                self._call(self._on_report, self._pipe.recv())
        except (EOFError, OSError):
            pass
        except Exception:
            log.exception("unreadable report from the engine process")
            self._process.kill()
        self._process.join()
        self._orders.put(None)
        self._call(self._on_exit, self._process.exitcode)

    def _call(self, function: Callable[..., None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, self, argument)
        except RuntimeError:  # the loop is closed: the server has stopped
            return
