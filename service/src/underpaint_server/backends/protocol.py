"""What the engine asks of a backend."""

from collections.abc import Sequence
from typing import Any, Protocol

from underpaint_server.models.facts import Facts
from underpaint_server.rows import Batch, Row


class DeviceLost(Exception):
    """The device computes nothing any more in this process, after an illegal access for example; only a new process
    helps, and the supervisor starts one."""


class Backend(Protocol):
    """One model on one device. Used by one thread only."""

    facts: Facts

    def predict(self, batch: Batch) -> Sequence[Any]:
        """The answers of ``batch.rows``, in their order, from one forward pass of ``batch.size`` rows.

        At one and the same size, a row's answer has the same bits whatever its neighbours and its position are.
        Raises :class:`OutOfMemory` when the device cannot hold the pass; the backend stays usable. Raises
        :class:`DeviceLost` when it does not.
        """
        ...

    def batch_class(self, kind: type[Row], shape: tuple[int, ...]) -> int | None:
        """Rows that passes of this kind and shape must have for equal rows to give equal bits; None for any number.

        Reading once a job, when it starts.
        """
        ...

    def minimum(self, kind: type[Row]) -> int:
        """Fewest rows of a pass; fewer are padded."""
        ...

    def memory_bytes(self) -> dict[str, int]:
        """Device memory by kind (allocated, reserved, peak, total); empty where there is none to speak of."""
        ...


def padded(rows: Sequence[Row], size: int) -> list[Any]:
    """``rows``, the last one repeated until there are ``size``."""
    return [*rows, *[rows[-1]] * (size - len(rows))]
