"""Underpaint's server: a gRPC service for diffusion inversion and real-image editing."""

__version__ = "0.1.0"
