"""Decoding of uploaded images in processes of their own, which are killed at a limit of time or memory.

``process`` is the front process's side. ``host`` is a child process that has the libraries loaded and forks one process
for each image; ``structure`` and ``pixels`` run there, and load neither gRPC nor protobuf nor torch.
"""

from typing import Final

ACCEPTED: Final = b"."
"""What the host sends first to each task's socket."""
ENDED: Final = b"\nended "
"""Begins the host's last line about a process that did not answer; its exit status follows."""
OUT_OF_MEMORY: Final = 3
"""Exit status of a process that reached its limit of memory."""
