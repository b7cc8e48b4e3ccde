"""Many edits at once, with both clients: order, how many at a time, failures."""

import asyncio
import itertools
import threading
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from underpaint import AsyncClient, Edited, errors
from underpaint.methods import SdEdit


class Watched:
    """Edits of the contract, with the largest number of them at once, and photos that wait for others."""

    def __init__(self, server):
        self.largest = 0
        self.begun = []
        self.slow = {}
        self.left = 0
        self._running = 0
        self._lock = threading.Lock()
        self._edit = server._edit
        server._edit = self

    def __call__(self, request, context):
        photo = request.image.content
        with self._lock:
            self.begun.append(photo)
            self._running += 1
            self.largest = max(self.largest, self._running)
        try:
            while photo in self.slow and not self.slow[photo].wait(0.01):
                if not context.is_active():
                    self.left += 1
                    break
            return self._edit(request, context)
        finally:
            with self._lock:
                self._running -= 1


@pytest.fixture
def watched(server):
    return Watched(server)


def photos(number):
    return [b"photo %d" % index for index in range(number)]


def sent(results):
    """Which photo each result was made from."""
    return [result.resolved.message.image.content for result in results]


def test_results_come_in_the_order_of_the_photos_whichever_is_done_first(client, watched):
    watched.slow[b"photo 0"] = threading.Event()
    opening = open_when(lambda: len(watched.begun) > 3, watched.slow[b"photo 0"])
    results = client.collect("edit_many", sources=photos(10), target_prompt="t", method=SdEdit(), concurrency=3)
    opening.join()
    assert sent(results) == photos(10)
    assert watched.largest <= 3


def open_when(condition, gate):
    """A thread that lets the photos behind a gate go on."""

    def wait():
        pause = threading.Event()
        while not condition():
            pause.wait(0.01)
        gate.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_no_more_than_concurrency_run_at_once_and_no_fewer(client, watched):
    gate = threading.Event()
    watched.slow = dict.fromkeys(photos(4), gate)
    opening = open_when(lambda: watched.largest == 4, gate)
    assert len(client.collect("edit_many", sources=photos(30), method=SdEdit(), concurrency=4)) == 30
    opening.join()
    assert watched.largest == 4


def test_settings_are_those_of_one_edit(client, server):
    settings = {"seed": 3, "guidance_scale": 2.0, "output_media_type": "image/webp", "fit": "pad", "model": "mini"}
    results = client.collect("edit_many", sources=photos(2), target_prompt="t", method=SdEdit(steps=4), **settings)
    assert [result.resolved.seed for result in results] == [3, 3]
    first, second = server.named("Edit")
    assert first.request_id != second.request_id
    assert (first.target_prompt, first.sdedit.steps, first.model) == ("t", 4, "models/mini")
    assert first.output_media_type == second.output_media_type == "image/webp"


def refusing(watched, refused, refusal):
    edit = watched._edit
    watched._edit = lambda request, context: (refusal if request.image.content == refused else edit)(request, context)


def test_a_failure_takes_the_place_of_its_result(client, watched, refusal, tmp_path):
    refusing(watched, b"photo 2", refusal(grpc.StatusCode.INVALID_ARGUMENT, "IMAGE_UNDECODABLE", "no picture"))
    sources = [*photos(4), tmp_path / "absent.png", b"photo 5"]
    results = client.collect("edit_many", sources=sources, method=SdEdit(), on_error="return", concurrency=2)
    assert isinstance(results[2], errors.ImageUndecodable)
    assert isinstance(results[4], FileNotFoundError)
    assert sent(result for result in results if isinstance(result, Edited)) == [*photos(2), b"photo 3", b"photo 5"]


def test_by_default_a_failure_is_raised_at_its_turn(connect, server, watched, refusal):
    refusing(watched, b"photo 2", refusal(grpc.StatusCode.INVALID_ARGUMENT, "IMAGE_UNDECODABLE", "no picture"))
    driver = connect(server.target)
    results = driver.client.edit_many(photos(50), method=SdEdit(), concurrency=2)
    assert sent([step(driver, results), step(driver, results)]) == photos(2)
    with pytest.raises(errors.ImageUndecodable):
        step(driver, results)
    assert len(watched.begun) < 50


def step(driver, results):
    """The next result."""
    return driver._runner.run(anext(results)) if driver.is_async else next(results)


def test_photos_are_read_as_they_are_needed_and_leaving_begins_no_more(connect, server, watched):
    """The photos come from a generator without an end."""
    driver = connect(server.target)
    drawn = itertools.count()
    results = driver.client.edit_many((b"photo %d" % index for index in drawn), method=SdEdit(), concurrency=2)
    assert sent([step(driver, results) for _ in range(3)]) == photos(3)
    if driver.is_async:
        driver._runner.run(results.aclose())
    else:
        results.close()
    assert next(drawn) <= 3 + 4 * 2


@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_an_error_of_the_sources_comes_after_the_results_before_it(connect, server, watched, on_error):
    def drawn():
        yield from photos(3)
        raise OSError("the disk is gone")

    driver = connect(server.target)
    results = driver.client.edit_many(drawn(), method=SdEdit(), on_error=on_error)
    assert sent([step(driver, results) for _ in range(3)]) == photos(3)
    with pytest.raises(OSError, match="the disk is gone"):
        step(driver, results)


@pytest.mark.parametrize("single", ["photo.png", b"photo"])
def test_a_single_image_is_not_taken_for_many(client, server, single):
    with pytest.raises(TypeError, match="sources is a single image"):
        client.collect("edit_many", sources=single, method=SdEdit(), on_error="return")
    assert server.requests == []


def test_leaving_cancels_the_tasks_that_run(server, watched):
    gate = threading.Event()
    watched.slow = dict.fromkeys(photos(9)[1:], gate)

    async def take():
        async with AsyncClient(server.target) as client:
            results: Any = client.edit_many(photos(9), method=SdEdit(), concurrency=3)
            first = await anext(results)
            while len(watched.begun) < 4:
                await asyncio.sleep(0.01)
            await results.aclose()
            while watched.left < 3:
                await asyncio.sleep(0.01)
        return first

    assert sent([asyncio.run(take())]) == photos(1)
    assert len(watched.begun) == 4
    assert not gate.is_set()


def test_a_full_queue_is_waited_for(client, server, refusal):
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(50)
    full = refusal(grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL", "64 wait", retry)
    server.script("Edit", *[full] * 3)
    results = client.collect("edit_many", sources=photos(12), method=SdEdit(), on_error="return", concurrency=4)
    assert sent(results) == photos(12)


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"concurrency": -1}, {"on_error": "ignore"}])
def test_wrong_arguments_are_refused_before_a_call(client, server, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        client.collect("edit_many", sources=photos(2), **wrong)
    assert server.requests == []


def test_no_photos_are_no_results(client, server):
    assert client.collect("edit_many", sources=[]) == []
    assert server.requests == []
