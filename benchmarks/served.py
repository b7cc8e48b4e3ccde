"""Helpers for the server under test: its counters, many requests at the same time, an empty store."""

import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from underpaint import Client, DiffEdit
from underpaint_server.local_server import LocalServer

from benchmarks.cases import Case, pixels

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Counters:
    """Network passes and rows that a server has computed, from its metrics."""

    passes: float
    rows: float
    """Network rows of jobs."""
    padding: float
    """Padding rows, which belong to no job."""

    @classmethod
    def read(cls, server: LocalServer) -> "Counters":
        """The current values of ``server``."""
        with urllib.request.urlopen(server.metrics_url, timeout=30) as page:
            families = {family.name: family for family in text_string_to_metric_families(page.read().decode())}
        return cls(*(
            sum(sample.value for sample in families[f"underpaint_{name}"].samples if sample.name.endswith("_total"))
            for name in ("denoising_steps", "network_rows", "padding_rows")
        ))  # fmt: skip

    def __sub__(self, earlier: "Counters") -> "Counters":
        return Counters(self.passes - earlier.passes, self.rows - earlier.rows, self.padding - earlier.padding)

    @property
    def rows_per_pass(self) -> float:
        """Mean number of jobs' rows in a pass."""
        return self.rows / self.passes

    @property
    def padding_share(self) -> float:
        """Share of padding among all rows computed, 0 to 1."""
        return self.padding / (self.rows + self.padding)


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Make all calls at the same time, each in a thread; their results in order."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(lambda call: call(), calls))


def forget(client: Client) -> None:
    """Delete all stored inversions, so that the next request computes its own."""
    for inversion in list(client.list_inversions(page_size=100)):
        client.delete_inversion(inversion, allow_missing=True)


def through_autoencoder(client: Client, case: Case, model: str = "") -> NDArray[np.uint8]:
    """Pixels of the photo encoded and decoded, (height, width, 3), from a DiffEdit edit with an empty mask."""
    empty = Image.new("L", (case.source.shape[1], case.source.shape[0]), 0)
    kept = client.edit(case.photo, case.target_prompt, DiffEdit(mask=empty, steps=1, strength=1.0), model=model)
    return pixels(kept.image)
