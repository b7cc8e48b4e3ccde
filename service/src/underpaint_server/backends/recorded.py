"""Passes that are recorded once and replayed: on a GPU, queueing a network's kernels one by one takes longer than
computing a small pass.

This module decides what is recorded and when; a :class:`Recorder` does it, see :mod:`underpaint_server.backends.cuda`.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
import torch
from torch import Tensor

from underpaint_server.models.graphs import Function
from underpaint_server.models.taps import Handler, Taps

log = structlog.get_logger(__name__)

RARE = 8
"""Recordings that are kept of passes other than those prepared at start: other image sizes, batch classes of stored
inversions, and rows whose activations are captured or mapped."""

Between = Callable[[str, Tensor], None]
"""Function of a feature site and the activation there, which it may change in place."""


class Recording(Protocol):
    """A recorded call of a function."""

    def replay(self, between: Between) -> Tensor:
        """Queue the call again, on what its inputs now hold. Returns its output, the same memory each time.

        ``between`` is called for each feature site at which the recording is cut, when what leads there is queued.
        """
        ...


class Recorder(Protocol):
    """Records calls of functions on the device."""

    def record(self, function: Callable[[Handler], Tensor]) -> Recording:
        """Record a call of ``function``, which reads inputs that stay where they are.

        The function gets a handler, and calls it at each site at which the recording is to be cut, with the activation;
        it goes on with the tensor that it returns. Raises RuntimeError if the call cannot be recorded.
        """
        ...


class Unequal(RuntimeError):
    """A replay does not give the bits of the call that was recorded."""


@dataclass(frozen=True, slots=True, eq=False)
class _Recorded:
    inputs: tuple[Tensor, ...]
    """The memory that the recording reads."""
    recording: Recording


_Key = tuple[tuple[tuple[torch.Size, torch.dtype], ...], tuple[str, ...]]
"""Shapes and dtypes of the inputs, and the feature sites at which the recording is cut."""


class Recorded:
    """A network's function of batches, replayed where it can be, with the same answers.

    Nothing is recorded before :meth:`prepare`. Later each kind of pass is recorded when it first comes, and at most
    ``rare`` of these recordings are kept, the last used. What cannot be recorded is called as before. No answer shares
    memory with a recording.
    """

    def __init__(self, function: Function, taps: Taps, recorder: Recorder, rare: int = RARE) -> None:
        self._function = function
        self._taps = taps
        self._recorder = recorder
        self._rare_limit = rare
        self._prepared: dict[_Key, _Recorded] = {}
        self._rare: OrderedDict[_Key, _Recorded | None] = OrderedDict()
        self._is_preparing = self._is_prepared = False

    def prepare(self, run_pass: Callable[[int], object], sizes: Sequence[int]) -> None:
        """Record passes of these numbers of rows, which ``run_pass`` runs, and keep them.

        They share one pool of memory: the largest is recorded first, so that the smaller ones fit into what it needs.
        """
        began = time.monotonic()
        self._is_preparing = True
        for size in sorted(sizes, reverse=True):
            run_pass(size)
        self._is_preparing, self._is_prepared = False, True
        seconds = round(time.monotonic() - began, 1)
        log.info("passes recorded", sizes=[inputs[0][0][0] for inputs, _ in self._prepared], seconds=seconds)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's output for these inputs."""
        recorded = self._recorded(inputs) if self._is_preparing or self._is_prepared else None
        if recorded is None:
            return self._function(*inputs)
        for held, given in zip(recorded.inputs, inputs, strict=True):
            held.copy_(given, non_blocking=True)
        return recorded.recording.replay(self._change).clone()

    def _recorded(self, inputs: tuple[Tensor, ...]) -> _Recorded | None:
        key = tuple((x.shape, x.dtype) for x in inputs), self._taps.wanted
        if key in self._prepared:
            return self._prepared[key]
        if key in self._rare:
            self._rare.move_to_end(key)
            return self._rare[key]
        recorded = self._try_record(inputs, key[1])
        if self._is_preparing and recorded is not None:
            self._prepared[key] = recorded
        else:
            self._rare[key] = recorded
            if len(self._rare) > self._rare_limit:
                self._rare.popitem(last=False)
        return recorded

    def _try_record(self, inputs: tuple[Tensor, ...], sites: tuple[str, ...]) -> _Recorded | None:
        rows = len(inputs[0])
        try:
            return self._record(inputs, sites)
        except torch.OutOfMemoryError:
            log.warning("no memory to record a pass; its kernels are queued one by one", rows=rows)
        except RuntimeError as error:
            log.warning("a pass cannot be recorded; its kernels are queued one by one", rows=rows, cause=str(error))
        return None

    def _record(self, inputs: tuple[Tensor, ...], sites: tuple[str, ...]) -> _Recorded:
        """Record a call, and compare a replay with the call itself."""
        held = tuple(x.clone() for x in inputs)

        def function(handler: Handler) -> Tensor:
            def at_cuts(site: str, activation: Tensor) -> Tensor | None:
                return handler(site, activation) if site in sites else None

            with self._taps.handled_by(at_cuts):
                return self._function(*held)

        recording = self._recorder.record(function)
        if not torch.equal(recording.replay(_leave), function(_unchanged)):
            raise Unequal("a replay has other bits")
        return _Recorded(held, recording)

    def _change(self, site: str, activation: Tensor) -> None:
        changed = self._taps.change(site, activation)
        if changed is not None:
            activation.copy_(changed)


def _leave(site: str, activation: Tensor) -> None:
    del site, activation


def _unchanged(site: str, activation: Tensor) -> None:
    del site, activation
