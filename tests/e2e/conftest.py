"""Servers that many tests share; every one is a real process on real ports."""

from collections.abc import Iterator

import pytest
from e2e.harness import ENDLESS
from underpaint_server.local_server import LocalServer


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """The embedded model with torch in float32. It computes every row, so that what is asked again is compared."""
    with LocalServer(store_url=tmp_path_factory.mktemp("store").as_uri(), reuse_bytes=0) as server:
        yield server


@pytest.fixture(scope="session")
def as_installed() -> Iterator[LocalServer]:
    """The embedded model as a server is installed: with the fastest backend, in bfloat16 where the CPU has it."""
    with LocalServer(backend="auto", dtype="auto") as server:
        yield server


@pytest.fixture(scope="session")
def toy() -> Iterator[LocalServer]:
    """The closed-form network, with limits low enough to be met."""
    with LocalServer(
        models="toy=toy:,other=toy:pinned", max_image_bytes=60_000, max_image_pixels=512 * 512, max_prompt_chars=100,
        max_steps=50, max_mask_samples=16, max_message_bytes=1_000_000,
    ) as server:  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def narrow() -> Iterator[LocalServer]:
    """One job at a time, three may wait; passes are so small that a job can be made to last."""
    with LocalServer(
        models="toy=toy:", max_running=1, queue_capacity=3, max_batch_size=2, max_mask_samples=100 * ENDLESS
    ) as server:
        yield server
