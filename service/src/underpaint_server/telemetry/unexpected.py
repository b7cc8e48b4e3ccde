"""Exceptions that no call waits for: those of callbacks, of tasks that nobody awaits, and of threads.

asyncio and threading only print them. Here they are logged like everything else, and counted for an alert.
"""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import structlog

from underpaint_server.telemetry.metrics import Metrics

_log = structlog.get_logger()


def count_unexpected_errors(loop: asyncio.AbstractEventLoop, metrics: Metrics) -> None:
    """Log and count every exception that nobody catches in callbacks and tasks of ``loop``, and in threads."""

    def on_loop_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        task = context.get("task") or context.get("future")
        source = "callback" if task is None else "task"
        metrics.on_unexpected_error(source=source)
        error = context.get("exception")
        _log.error("unexpected error", source=source, what=context["message"], task=_name(task), exc_info=error)

    def on_thread_error(args: threading.ExceptHookArgs) -> None:
        metrics.on_unexpected_error(source="thread")
        name = args.thread.name if args.thread is not None else ""
        _log.error("unexpected error", source="thread", what=name, exc_info=args.exc_value)

    loop.set_exception_handler(on_loop_error)
    threading.excepthook = on_thread_error


def report_unexpected(message: str, error: BaseException, task: "asyncio.Task[Any] | None" = None) -> None:
    """Log and count an exception of background work; ``task`` is the current one if it is not given."""
    context: dict[str, Any] = {"message": message, "exception": error}
    task = task or asyncio.current_task()
    if task is not None:
        context["task"] = task
    asyncio.get_running_loop().call_exception_handler(context)


def in_background(work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
    """A task that runs ``work``. If it raises, that is reported at once, and not when the task is collected."""
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(_report_failed)
    return task


def _report_failed(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        report_unexpected("a task in the background ended with an error", error, task)


def _name(task: object) -> str | None:
    """What a task runs; not its repr, which has the result, and that may be an answer to a caller."""
    return getattr(task.get_coro(), "__qualname__", None) if isinstance(task, asyncio.Task) else None
