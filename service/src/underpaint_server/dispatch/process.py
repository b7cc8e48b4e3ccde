"""The engine process as the front sees it: spawned, listened to, told, ended."""

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


class EngineProcess:
    """One child process. ``on_report`` and ``on_exit`` (with the exit code) are called on the loop that made it.

    The child is spawned, never forked: a fork would inherit gRPC's threads and sockets.
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
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=worker.main, args=(theirs, settings), name="engine", daemon=True)
        self._process.start()
        theirs.close()
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="engine reports", daemon=True).start()
        threading.Thread(target=self._send, name="engine orders", daemon=True).start()

    @property
    def pid(self) -> int | None:
        """Of the child."""
        return self._process.pid

    def send(self, order: Order) -> None:
        """Send an order, without waiting for the child to read it; what a dead child never read is lost with it."""
        self._orders.put(order)

    def kill(self) -> None:
        """End the child at once; ``on_exit`` follows."""
        self._process.kill()

    async def stop(self) -> None:
        """Ask the child to leave, and end it if it does not."""
        self.send(Stop())
        await asyncio.to_thread(self._process.join, STOP_S)
        self._process.kill()
        await asyncio.to_thread(self._process.join)

    def _send(self) -> None:
        """On a thread of its own: a pipe that nobody reads would otherwise stop the loop, and with it the watchdog."""
        try:
            while (order := self._orders.get()) is not None:
                self._pipe.send(order)
        except OSError:  # the child is gone, which _listen hears too
            return

    def _listen(self) -> None:
        try:
            while True:
                self._call(self._on_report, self._pipe.recv())
        except (EOFError, OSError):
            pass
        except Exception:
            log.exception("a report of the engine cannot be read")
            self._process.kill()
        self._process.join()
        self._orders.put(None)
        self._call(self._on_exit, self._process.exitcode)

    def _call(self, function: Callable[..., None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, self, argument)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            return
