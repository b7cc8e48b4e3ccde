"""Underpaint's server: a gRPC service for diffusion inversion and real-image editing."""

from importlib.metadata import version

__version__ = version("underpaint-server")
