"""The version of client, server and embedded weights: every other mention is read from here."""

__version__ = "0.1.0"
