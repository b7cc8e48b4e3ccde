"""The composition root: builds the server's parts from the settings, starts, drains and stops them."""

import asyncio
import resource
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeAlias

import grpc
import structlog
from obstore.exceptions import BaseError

from underpaint_server.decoder.process import Decoder
from underpaint_server.dispatch.queue import Dispatcher
from underpaint_server.errors import ModelNotReady, StoreUnavailable
from underpaint_server.memory import return_freed_memory
from underpaint_server.rpc.context import ServerContext
from underpaint_server.rpc.listener import Listener
from underpaint_server.rpc.server import build_server
from underpaint_server.rpc.services.health import Health
from underpaint_server.settings import Settings
from underpaint_server.stores import Stores
from underpaint_server.telemetry import (
    Metrics,
    configure_logging,
    count_unexpected_errors,
    in_background,
    log_lines,
    log_prints,
)
from underpaint_server.telemetry.endpoint import serve_metrics

_log = structlog.get_logger()

Signals: TypeAlias = "asyncio.Queue[signal.Signals]"

_OTHER_FILES = 200
"""Files that the process has open besides the connections of callers: the store's, the engine's, the metrics'."""
_FLUSH_S = 5.0
"""Seconds for responses that are still being sent; health watchers' streams do not end on their own."""


async def serve(settings: Settings) -> int:
    """Run one server until SIGTERM or SIGINT; returns the exit status, 1 if it cannot open its store or ports.

    The first signal drains: new calls are refused with :class:`Draining` and running jobs get ``settings.drain_s``
    seconds. A second signal ends them at once.
    """
    configure_logging(settings.log_level)
    log_prints()
    return_freed_memory()
    _raise_open_files(settings.max_connections + _OTHER_FILES)
    metrics = Metrics()
    metrics.watch_log(log_lines())
    count_unexpected_errors(asyncio.get_running_loop(), metrics)
    try:
        stores = await Stores.open(settings, metrics)
    except (ValueError, OSError, BaseError, StoreUnavailable) as error:
        _log.error("cannot open the store", url=settings.store_url, error=str(error.__cause__ or error))
        return 1
    engine = Dispatcher(settings, metrics)
    metrics.watch_engine(engine)
    decoder = Decoder(settings.decoder_bytes)
    context = ServerContext.build(settings, engine, stores, metrics, decoder)
    metrics.watch_operations(context.manager)
    metrics.watch_calls(context.limits)
    health = Health(context)
    health.update()
    listener = Listener(lambda: build_server(context, health))
    signals = _signals()
    try:
        address = _bind(listener.server, settings.listen)
        with _metrics_server(metrics, settings.metrics_listen) as metrics_address:
            decoder.start()
            await engine.start()
            context.manager.start()
            await listener.start(address)
            _log.info("listening", address=address, metrics_address=metrics_address, models=list(engine.configured))
            await _until_stopped(context, health, listener, signals)
    except _CannotBind as error:
        _log.error("cannot listen", address=error.address, error=str(error.__cause__))
        return 1
    finally:
        await context.manager.close()
        await engine.close()
        await stores.close()
        context.threads.close()
        decoder.close()
    _log.info("stopped")
    return 0


def _raise_open_files(needed: int) -> None:
    """Raise the limit on open files of this process to what its connections need; logs a warning if it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        _log.warning("too few open files allowed for max-connections", needed=needed, allowed=allowed)


class _CannotBind(Exception):
    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address


def _bind(server: grpc.aio.Server, listen: str) -> str:
    host, _ = _host_port(listen)
    try:
        return f"{host}:{server.add_insecure_port(listen)}"
    except RuntimeError as error:
        raise _CannotBind(listen) from error


@contextmanager
def _metrics_server(metrics: Metrics, listen: str) -> Iterator[str]:
    host, port = _host_port(listen)
    with ExitStack() as stack:
        try:
            port = stack.enter_context(serve_metrics(metrics.registry, host.strip("[]"), port))
        except OSError as error:
            raise _CannotBind(listen) from error
        yield f"{host}:{port}"


def _host_port(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    return host, int(port)


def _signals() -> Signals:
    signals: Signals = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    return signals


async def _until_stopped(context: ServerContext, health: Health, listener: Listener, signals: Signals) -> None:
    background = [in_background(work) for work in (health.watch(), listener.watch(), _report_ready(context))]
    try:
        first = await signals.get()
        _log.info("draining", signal=first.name, seconds=context.settings.drain_s)
        context.draining, context.manager.taking = True, False
        health.update()
        await _drain(context, signals)
        await context.manager.close()
        await listener.stop(_FLUSH_S)
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)


async def _drain(context: ServerContext, signals: Signals) -> None:
    drain = asyncio.create_task(context.engine.drain(context.settings.drain_s))
    second = asyncio.create_task(signals.get())
    await asyncio.wait((drain, second), return_when=asyncio.FIRST_COMPLETED)
    if not drain.done():
        _log.info("draining ended by a second signal", signal=second.result().name)
        await context.engine.drain(0)
    for task in (drain, second):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _report_ready(context: ServerContext) -> None:
    try:
        await context.engine.wait_ready()
    except ModelNotReady as error:
        _log.error("models failed to load; calls that need one are refused", error=error.message)
    else:
        _log.info("ready", models={info.id: info.digest for info in context.engine.models.values()})
