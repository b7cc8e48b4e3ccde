"""Request-level batching: whole requests are batched and computed together, the last one to end ends all.

This is what runs behind the other serving frameworks. It uses the server's own programs and backend, and the rows of
all requests of a batch share passes whatever their method, so that only the scheduling differs from our server's: who
arrives while a batch runs waits for its end, and passes become small when the short requests of a batch are done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from underpaint_server.backends.protocol import Backend
from underpaint_server.diffusion.sampling import together
from underpaint_server.jobs import Edited, EditJob
from underpaint_server.programs.edit import edit
from underpaint_server.rows import Batch, Denoise, Encode, Row, is_network_row


@dataclass(slots=True)
class Work:
    """Network passes of a batcher since its start, as our server counts its own."""

    passes: int = 0
    rows: int = 0
    """Network rows of requests."""
    padding: int = 0
    """Padding rows, which belong to no request."""


class Lockstep:
    """Computes batches of jobs with one backend; ``max_batch_size`` is the largest number of rows of a pass."""

    def __init__(self, backend: Backend, max_batch_size: int) -> None:
        self._backend, self._largest = backend, max_batch_size
        self.work = Work()

    def run(self, jobs: Sequence[EditJob]) -> list[Edited]:
        """Results of all jobs, in order."""
        running = together(*(edit(job, self._backend.facts) for job in jobs))
        try:
            rows = next(running)
            while True:
                rows = running.send(self._answers(rows))
        except StopIteration as end:
            return list(end.value)

    def _answers(self, rows: Sequence[Row]) -> list[Any]:
        keyed: dict[tuple[type[Row], tuple[int, ...]], list[int]] = {}
        for i, row in enumerate(rows):
            keyed.setdefault((type(row), _shape(row)), []).append(i)
        answers: dict[int, Any] = {}
        for (kind, shape), indices in keyed.items():
            fixed = self._backend.batch_class(kind, shape)
            most = fixed or self._largest
            for part in (indices[k : k + most] for k in range(0, len(indices), most)):
                size = fixed or max(len(part), self._backend.minimum(kind))
                batch = Batch([rows[i] for i in part], size)
                answers.update(zip(part, self._backend.predict(batch), strict=True))
                if is_network_row(kind):
                    self.work.passes += 1
                    self.work.rows += len(part)
                    self.work.padding += size - len(part)
        return [answers[i] for i in range(len(rows))]


def _shape(row: Row) -> tuple[int, ...]:
    match row:
        case Denoise(latents=tensor) | Encode(image=tensor):
            return tuple(tensor.shape)
        case _:
            decoded = getattr(row, "latents", None)
            return tuple(decoded.shape) if isinstance(decoded, torch.Tensor) else ()
