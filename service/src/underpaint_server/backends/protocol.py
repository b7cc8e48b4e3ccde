"""The interface between the engine and a backend."""

from collections.abc import Sequence
from typing import Any, Protocol

from underpaint_server.backends.exactness import Verdict
from underpaint_server.models.facts import Facts
from underpaint_server.rows import Batch, Row


class DeviceLost(Exception):
    """The device cannot be used any more by this process, for example after an illegal memory access.

    The engine process ends, and the supervisor starts a new one.
    """


class Unfinished(Protocol):
    """A pass that was queued on the device, which may not have computed it yet."""

    def wait(self) -> float:
        """Wait until it is computed. Returns the seconds from when the device began it. Raises :class:`DeviceLost`."""
        ...


class Backend(Protocol):
    """One model on one device. Not thread-safe: one thread calls it."""

    facts: Facts
    """The loaded model; constant."""

    @property
    def verdict(self) -> Verdict | None:
        """What was measured of it; None if it was not measured, because it is known."""
        ...

    def predict(self, batch: Batch) -> Sequence[Any]:
        """Results of ``batch.rows``, in their order, from one forward pass of ``batch.size`` rows.

        In passes of equal size, the bits of a row's result depend neither on the other rows nor on its position.
        Raises :class:`OutOfMemory` if the pass does not fit in the device's memory; the backend stays usable. Raises
        :class:`DeviceLost` if it is not usable any more.

        On a GPU it returns when the pass is queued, and the results are tensors that will have their numbers: who works
        on them on the device, queues that work behind the pass; who reads them waits.
        """
        ...

    def unfinished(self) -> Unfinished | None:
        """The last pass of :meth:`predict`, where that returned before the device had computed it; None otherwise."""
        ...

    def batch_class(self, kind: type[Row], shape: tuple[int, ...]) -> int | None:
        """Batch class of rows of this kind and shape: the number of rows of their passes; None where it does not change
        the bits of a result. It is constant."""
        ...

    def minimum(self, kind: type[Row]) -> int:
        """Smallest size of a pass of rows of this kind; smaller passes are padded to it."""
        ...

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of device memory: "allocated", "reserved", "peak" and "total"; empty on the CPU."""
        ...


def padded(rows: Sequence[Row], size: int) -> list[Any]:
    """``rows``, padded to ``size`` rows by repeating the last."""
    return [*rows, *[rows[-1]] * (size - len(rows))]
