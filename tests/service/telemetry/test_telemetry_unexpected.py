"""Exceptions that no call waits for are logged and counted."""

import asyncio
import gc
import threading
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
from structlog.testing import capture_logs
from support.waiting import until
from underpaint_server.telemetry import Metrics, count_unexpected_errors, in_background

Lines = list[MutableMapping[str, Any]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """Log lines of the test."""
    hook = threading.excepthook
    with capture_logs() as lines:
        yield lines
    threading.excepthook = hook


def watched() -> Metrics:
    """Metrics that count what goes wrong on the running loop and in threads."""
    metrics = Metrics()
    count_unexpected_errors(asyncio.get_running_loop(), metrics)
    return metrics


def count(metrics: Metrics, source: str) -> float:
    return metrics.registry.get_sample_value("underpaint_unexpected_errors_total", {"source": source}) or 0.0


async def fail() -> None:
    raise ValueError("a fault")


async def test_a_callback_that_raises(lines: Lines) -> None:
    metrics = watched()
    asyncio.get_running_loop().call_soon(lambda: 1 // 0)
    await until(lambda: count(metrics, "callback") == 1)
    (line,) = lines
    assert (line["event"], line["log_level"]) == ("unexpected error", "error")
    assert isinstance(line["exc_info"], ZeroDivisionError)


async def test_a_task_in_the_background_that_raises_is_told_at_once(lines: Lines) -> None:
    metrics = watched()
    kept = in_background(fail())  # so it is not collected
    await until(lambda: count(metrics, "task") == 1)
    del kept
    gc.collect()
    await asyncio.sleep(0)
    (line,) = lines
    assert line["task"] == "fail"
    assert isinstance(line["exc_info"], ValueError)


async def test_a_task_that_nobody_awaits(lines: Lines) -> None:
    metrics = watched()
    asyncio.get_running_loop().create_task(fail())

    def collected() -> bool:
        gc.collect()
        return count(metrics, "task") == 1

    await until(collected)
    assert isinstance(lines[0]["exc_info"], ValueError)


async def test_a_cancelled_task_is_no_error(lines: Lines) -> None:
    metrics = watched()
    task = in_background(asyncio.sleep(1000))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
    assert count(metrics, "task") == 0
    assert lines == []


async def test_a_thread_that_raises(lines: Lines) -> None:
    metrics = watched()
    thread = threading.Thread(target=lambda: 1 // 0, name="worker")
    thread.start()
    thread.join()
    assert count(metrics, "thread") == 1
    (line,) = lines
    assert line["what"] == "worker"
    assert isinstance(line["exc_info"], ZeroDivisionError)
