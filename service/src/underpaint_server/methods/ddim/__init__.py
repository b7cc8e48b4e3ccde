"""DDIM: inversion along the deterministic sampler, and the edit from it."""
