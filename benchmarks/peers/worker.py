"""The worker behind the other serving frameworks: a batch of requests to a batch of answers, both JSON."""

import base64
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from underpaint_server.settings import Settings

from benchmarks.peers.edits import Edit, encoded
from benchmarks.peers.lockstep import Lockstep
from benchmarks.peers.setup import SERVER, backend


class BatchWorker:
    """Loads the server's network and computes whole batches with it."""

    def __init__(self) -> None:
        self._lockstep = Lockstep(backend(), Settings(**SERVER).max_batch_size)  # type: ignore[arg-type]

    def answers(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """For each edit its picture, and the work that this worker has done so far."""
        results = self._lockstep.run([Edit.from_json(request).job() for request in requests])
        work = asdict(self._lockstep.work)
        return [{"image": base64.b64encode(encoded(result.pixels)).decode(), "work": work} for result in results]
