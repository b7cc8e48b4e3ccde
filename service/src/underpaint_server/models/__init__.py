"""Checkpoints: finding, checking and loading them, and the networks that the torch backend evaluates."""
