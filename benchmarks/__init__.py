"""Speed and quality figures of Underpaint, measured on the real server: ``python -m benchmarks --help``."""
