"""``python -m benchmarks.peers.behind_mosec --address 127.0.0.1 --port PORT``: the network behind mosec."""

from typing import Any

import mosec

from benchmarks.peers.setup import AT_ONCE, BATCH_TIMEOUT_S
from benchmarks.peers.worker import BatchWorker

LIMIT_S = 3600
"""Time limit of a batch; its default of three seconds is shorter than an edit."""


class Edits(mosec.Worker):  # type: ignore[misc]
    """One worker that batches requests as mosec's documentation says."""

    def __init__(self) -> None:
        super().__init__()
        self._worker = BatchWorker()

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers of a batch."""
        return self._worker.answers(data)


def main() -> None:
    """Serve until SIGTERM."""
    server = mosec.Server()
    server.append_worker(Edits, max_batch_size=AT_ONCE, max_wait_time=round(1000 * BATCH_TIMEOUT_S), timeout=LIMIT_S)
    server.run()


if __name__ == "__main__":
    main()
