"""Decoding of uploaded images in processes of their own, which are killed at a limit of time or memory.

``process`` is the front process's side. ``host`` is a child process that has the libraries loaded and forks one process
for each image; ``structure`` and ``pixels`` run there, and load neither gRPC nor protobuf nor torch.
"""
