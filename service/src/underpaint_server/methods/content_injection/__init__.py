"""Content injection: one image's content in the look of another."""
