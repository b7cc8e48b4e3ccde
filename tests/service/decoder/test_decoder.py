"""The decoder's processes: whatever the bytes are, they end in time, take bounded memory, and harm no other image."""

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytest_asyncio
from PIL import Image
from support.front import MINI, encoded, picture
from support.hostile import FILES
from support.waiting import until
from underpaint_server.decoder.process import LARGE_PX, Decoder, Share
from underpaint_server.errors import ImageTooLarge, ImageUndecodable, WorkerRestarted
from underpaint_server.jobs import Picture
from underpaint_server.wire.fitting import Fitting
from underpaint_server.wire.headers import IMAGE, ImageLimits, read_header

Task = asyncio.Task[tuple[Picture, Fitting]]
LIMITS = ImageLimits(16 * 1024 * 1024, 6144 * 4096, 32)
MEMORY = 1024 * 1024 * 1024
SMALL = encoded(picture())
LARGE = encoded(Image.new("RGB", (2500, 2000)), compress_level=1)
assert LARGE_PX < 2500 * 2000
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other kernels cannot do this")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Decoder]:
    """Used by all tests that do it no harm."""
    decoder = Decoder(MEMORY)
    yield decoder
    decoder.close()


@pytest.fixture
def own() -> Iterator[Decoder]:
    decoder = Decoder(MEMORY)
    decoder.start()
    yield decoder
    decoder.close()


async def decode(decoder: Decoder, content: bytes) -> tuple[Picture, Fitting]:
    return await decoder.picture(content, read_header(content, LIMITS, IMAGE), LIMITS, 0, MINI)


def processes(decoder: Decoder) -> list[psutil.Process]:
    """Those of images that are being decoded."""
    return psutil.Process(decoder.pid).children()


@contextmanager
def suspended(decoder: Decoder) -> Iterator[psutil.Process]:
    """The host accepts nothing."""
    host = psutil.Process(decoder.pid)
    host.suspend()
    try:
        yield host
    finally:
        with suppress(psutil.NoSuchProcess):
            host.resume()


@contextmanager
def no_descriptors() -> Iterator[None]:
    """None is free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def caught(decoder: Decoder, content: bytes) -> tuple[Task, psutil.Process]:
    """A call whose process was stopped in the middle of its work, and that process."""
    while True:
        call = asyncio.create_task(decode(decoder, content))
        while not call.done():
            await asyncio.sleep(0.001)
            for process in processes(decoder):
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
                    await until(lambda: process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE))  # noqa: B023
                    if process.status() == psutil.STATUS_STOPPED:
                        return call, process


OUTCOMES = {
    "jpeg of 30 000 scans": "scans",
    "small jpeg of 30 000 scans": "scans",
    "png of one column": "aspect ratio",
    "png of one row": "aspect ratio",
    "png of one column without data": "aspect ratio",
    "jpeg of empty comments": "segments",
    "jpeg of empty comments behind the frame": "segments",
    "jpeg of junk": "",
    "jpeg of fill bytes": "",
    "png of empty chunks": "chunks",
    "png of empty text": "chunks",
    "png of packed text": "",
    "png of packed international text": "bytes of memory",
    "png of a packed profile": "",
    "png of many profiles": "seconds of CPU time",
    "png of overlapping exif": None,
    "png of exif in a circle": None,
    "jpeg of overlapping exif": None,
    "jpeg of a huge profile": None,
    "webp of 250 megapixels": "pixels",
    "webp of 24 megapixels": None,
    "png of 24 megapixels": None,
}
"""None for what is decoded, the unit of which there is too much, or "" for what cannot be decoded."""


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("case", FILES)
async def test_a_file_made_to_cost_much_is_refused_for_what_is_too_much_of(shared: Decoder, case: str) -> None:
    unit = OUTCOMES[case]
    if unit is None:
        pixels, _ = await decode(shared, FILES[case]())
        assert pixels.shape == (48, 64, 3)
        return
    with pytest.raises(ImageTooLarge if unit else ImageUndecodable) as refusal:
        await decode(shared, FILES[case]())
    if unit:
        assert refusal.value.metadata["unit"] == unit
        assert refusal.value.metadata["limit"] in refusal.value.message
    pixels, _ = await decode(shared, SMALL)
    np.testing.assert_array_equal(pixels, np.asarray(picture()))


@pytest.mark.asyncio(loop_scope="module")
async def test_large_images_do_not_hold_up_small_ones(shared: Decoder) -> None:
    call, process = await caught(shared, LARGE)
    others = [asyncio.create_task(decode(shared, LARGE)) for _ in range(6)]
    for _ in range(4):
        await decode(shared, SMALL)
    assert not call.done()
    process.resume()
    assert all(pixels.shape == (48, 64, 3) for pixels, _ in await asyncio.gather(call, *others))


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
async def test_a_caller_who_leaves_ends_the_process_and_frees_its_memory(own: Decoder, content: bytes) -> None:
    await decode(own, SMALL)
    with suspended(own):  # so none is done before its caller leaves
        calls = [asyncio.create_task(decode(own, content)) for _ in range(30)]
        await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        ends = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(end) for end in ends} == {asyncio.CancelledError}
    pixels, _ = await decode(own, content)
    assert pixels.shape == (48, 64, 3)
    await until(lambda: not processes(own))


async def test_a_process_in_the_middle_of_its_work_ends_with_its_caller(own: Decoder) -> None:
    call, process = await caught(own, LARGE)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await until(lambda: not process.is_running())


async def test_a_host_that_was_killed_is_replaced(own: Decoder) -> None:
    await decode(own, SMALL)
    first = own.pid
    assert first is not None
    psutil.Process(first).kill()
    for _ in range(3):
        pixels, _ = await decode(own, SMALL)
        np.testing.assert_array_equal(pixels, np.asarray(picture()))
    assert own.pid != first
    assert not psutil.pid_exists(first), "it was waited for"


async def test_a_host_that_accepts_nothing_is_replaced_before_it_stops_the_front(own: Decoder) -> None:
    await decode(own, SMALL)
    first = own.pid
    psutil.Process(first).suspend()
    while own.pid == first:  # until no more tasks can be put into its socket
        call = asyncio.create_task(decode(own, SMALL))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await decode(own, SMALL)
    assert not psutil.pid_exists(first or 0)


@LINUX
async def test_a_stopped_host_is_replaced_also_when_no_caller_waits_long(
    own: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("underpaint_server.decoder.process.FROZEN_S", 0.5)
    await decode(own, SMALL)
    with suspended(own) as host:
        with suppress(TimeoutError):
            await asyncio.wait_for(decode(own, SMALL), 0.1)
        await asyncio.sleep(0.6)
        pixels, _ = await decode(own, SMALL)
        np.testing.assert_array_equal(pixels, np.asarray(picture()))
        assert own.pid != host.pid
    with suspended(own):
        pixels, _ = await decode(own, SMALL)
        np.testing.assert_array_equal(pixels, np.asarray(picture()))


async def test_without_descriptors_a_caller_is_told_to_retry_and_the_next_is_served(own: Decoder) -> None:
    await decode(own, SMALL)
    host = own.pid
    with no_descriptors(), pytest.raises(WorkerRestarted):
        await decode(own, SMALL)
    pixels, _ = await decode(own, SMALL)
    np.testing.assert_array_equal(pixels, np.asarray(picture()))
    assert own.pid == host, "and what it decodes went on"


async def test_a_host_that_the_system_refuses_at_the_start_is_started_with_the_first_image() -> None:
    decoder = Decoder(MEMORY)
    try:
        with no_descriptors():
            decoder.start()
        assert decoder.pid is None
        pixels, _ = await decode(decoder, SMALL)
        np.testing.assert_array_equal(pixels, np.asarray(picture()))
    finally:
        decoder.close()


async def test_an_image_that_waits_when_the_host_is_killed_is_decoded_by_the_next(own: Decoder) -> None:
    await decode(own, SMALL)
    with suspended(own) as host:
        call = asyncio.create_task(decode(own, SMALL))
        await asyncio.sleep(0)
        host.kill()
        pixels, _ = await call
    np.testing.assert_array_equal(pixels, np.asarray(picture()))


async def test_a_process_that_the_system_kills_for_memory_is_told_so_and_harms_no_other(own: Decoder) -> None:
    call, process = await caught(own, LARGE)
    process.kill()
    with pytest.raises(ImageTooLarge) as refusal:
        await call
    assert refusal.value.metadata["unit"] == "bytes of memory"
    pixels, _ = await decode(own, LARGE)
    assert pixels.shape == (48, 64, 3)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
async def test_a_library_that_crashes_is_told_so(own: Decoder, number: signal.Signals) -> None:
    call, process = await caught(own, LARGE)
    process.send_signal(number)
    process.resume()
    with pytest.raises(ImageUndecodable, match="crashed"):
        await call


SCRIPT = """
import asyncio, sys
from underpaint_server.decoder.process import Decoder
decoder = Decoder(1 << 30)
decoder.start()
print(decoder.pid, flush=True)
sys.stdin.read()
"""


def ignores_sigterm(pid: int) -> bool:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn:")]
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("is_stopped", [False, pytest.param(True, marks=LINUX)])
async def test_the_host_ends_when_the_front_is_killed(is_stopped: bool) -> None:
    front = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert front.stdin is not None
    assert front.stdout is not None
    with front, front.stdin, front.stdout:
        host = psutil.Process(int(front.stdout.readline()))
        if is_stopped:
            await until(lambda: ignores_sigterm(host.pid))  # its imports are done
            host.suspend()
        os.kill(front.pid, signal.SIGKILL)
        front.wait()
        await until(lambda: not host.is_running() or host.status() == psutil.STATUS_ZOMBIE)


async def test_the_host_has_one_thread_and_no_socket_of_the_front(own: Decoder) -> None:
    with socket.create_server(("127.0.0.1", 0)):
        await decode(own, SMALL)
        host = psutil.Process(own.pid)
        assert host.net_connections() == []
        assert host.num_threads() == 1, "so that it may fork"


# --- shares -------------------------------------------------------------------------------------------------------


async def test_parts_are_handed_out_in_order() -> None:
    share, order = Share(10), []
    opened: list[asyncio.Event] = [asyncio.Event() for _ in range(4)]

    async def take(number: int, amount: int) -> None:
        async with share.part(amount):
            order.append(number)
            await opened[number].wait()

    tasks = [asyncio.create_task(take(number, amount)) for number, amount in enumerate((6, 7, 3, 100))]
    await asyncio.sleep(0)
    assert order == [0], "the third would fit, but the second is before it"
    opened[0].set()
    await until(lambda: order == [0, 1, 2])
    opened[1].set()
    opened[2].set()
    await until(lambda: order == [0, 1, 2, 3])
    opened[3].set()
    await asyncio.gather(*tasks)
    async with share.part(10):
        pass


async def test_who_leaves_while_waiting_takes_nothing_along() -> None:
    share = Share(10)

    async def take(amount: int) -> None:
        async with share.part(amount):
            pass

    async with share.part(4):
        large, small = asyncio.create_task(take(10)), asyncio.create_task(take(6))
        await asyncio.sleep(0)
        large.cancel()
        await small
    async with share.part(10):
        gone = asyncio.create_task(take(10))
        await asyncio.sleep(0)
    gone.cancel()  # at the moment in which it was given its part
    await asyncio.gather(gone, return_exceptions=True)
    async with asyncio.timeout(60), share.part(10):
        pass
