"""``python -m benchmarks.peers.behind_litserve PORT``: the network behind LitServe, in the environment of the peers."""

import sys
from typing import Any

import litserve

from benchmarks.peers.setup import AT_ONCE, BATCH_TIMEOUT_S
from benchmarks.peers.worker import BatchWorker


class Api(litserve.LitAPI):  # type: ignore[misc]
    """One worker that batches requests as LitServe's documentation says."""

    def setup(self, device: str) -> None:
        """Load the network, in the worker process."""
        del device
        self._worker = BatchWorker()

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Requests as a batch: a list."""
        return inputs

    def predict(self, x: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers of a batch."""
        return self._worker.answers(x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One answer for each request."""
        return output


def main() -> None:
    """Serve until SIGTERM."""
    api = Api(max_batch_size=AT_ONCE, batch_timeout=BATCH_TIMEOUT_S)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=False)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
