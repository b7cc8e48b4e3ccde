"""The engine process seen from the front process: spawn it, send orders, receive reports, end it."""

import asyncio
import multiprocessing
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import resource_tracker, util

import structlog

from underpaint_server.cores import cpu_seconds
from underpaint_server.dispatch.stall import CpuUse
from underpaint_server.engine import worker
from underpaint_server.engine.messages import Order, Report, Stop
from underpaint_server.settings import Settings
from underpaint_server.signals import stop_signals_blocked

log = structlog.get_logger(__name__)

STOP_S = 5.0
"""Seconds that the child has to exit after a :class:`Stop` order before it is killed, and then until it is given up."""


class EngineProcess:
    """One child process, started at once. To be made on a running event loop, in the main thread.

    ``on_report`` and ``on_exit`` (with the exit code) are called on that loop, with this object first. The child is
    spawned and not forked, because a fork would inherit gRPC's threads and sockets. Raises :class:`OSError` or
    :class:`RuntimeError` if the system has no descriptor, process or thread left for it; then there is no child.
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
        self._exited = asyncio.Event()
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self.use = CpuUse(settings.stall_s)
        """CPU time of the child, by :meth:`look`."""
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=worker.main, args=(child_pipe, settings), name="engine", daemon=True)
        self._sender = threading.Thread(target=self._send, name="engine orders", daemon=True)
        try:
            resource_tracker.ensure_running()  # with the first child, where it would end the block below
            # The kernel ends the child with the thread that spawns it, so that must be the main thread.
            with stop_signals_blocked():
                self._process.start()
            # At the exit of this process, multiprocessing would wait for a child that ignores SIGTERM.
            util.Finalize(None, self._process.kill, exitpriority=0)
            self._sender.start()
            threading.Thread(target=self._listen, name="engine reports", daemon=True).start()
        except BaseException:
            self._abandon()
            raise
        finally:
            child_pipe.close()

    @property
    def pid(self) -> int | None:
        """Process id of the child."""
        return self._process.pid

    @property
    def is_frozen(self) -> bool:
        """Whether the child got no CPU time at all for ``stall_s`` seconds: it was stopped, or waits in the kernel."""
        return self.use.share == 0

    def cpu_s(self) -> float | None:
        """CPU seconds that the child has used; None where they are not known."""
        return None if self.pid is None else cpu_seconds(self.pid)

    def look(self, elapsed_s: float) -> None:
        """Measure how much CPU time the child gets; ``elapsed_s`` seconds have passed since the last look."""
        self.use.look(self.cpu_s(), elapsed_s)

    def send(self, order: Order) -> None:
        """Enqueue an order without waiting; orders to a child that has ended are dropped."""
        self._orders.put(order)

    def kill(self) -> None:
        """Kill the child; ``on_exit`` is called afterwards."""
        self._process.kill()

    async def stop(self, *, politely: bool) -> None:
        """End the child: ask it first and kill it after :data:`STOP_S` seconds, or kill it at once."""
        if politely:
            self.send(Stop())
            await self._wait()
        self.kill()
        if not await self._wait():
            log.error("engine process does not end", pid=self.pid)

    async def _wait(self) -> bool:
        """Whether the child has exited and was reaped, within :data:`STOP_S` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self._exited.wait()
        return self._exited.is_set()

    def _abandon(self) -> None:
        """Leave nothing of a start that failed."""
        self._orders.put(None)
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def _send(self) -> None:
        # In a thread of its own: writing to a pipe whose reader hangs would block the event loop and its watchdog.
        try:
            while (order := self._orders.get()) is not None:
                self._pipe.send(order)
        except OSError:  # the child has ended, which _listen notices too
            return
        except Exception:
            log.exception("order cannot be sent to the engine process")
            self._process.kill()

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
        exit_code = self._process.exitcode
        self._orders.put(None)
        self._sender.join()
        self._pipe.close()
        self._call(self._end, exit_code)

    def _end(self, _: "EngineProcess", exit_code: int | None) -> None:
        self._exited.set()
        self._on_exit(self, exit_code)

    def _call(self, function: Callable[..., None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, self, argument)
        except RuntimeError:  # the loop is closed: the server has stopped
            return
