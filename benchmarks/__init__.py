"""Benchmarks of speed, exactness and quality, most of them on a real server: ``python -m benchmarks --help``."""
