"""DDIM: inversion by the reversed deterministic sampler, and the edit from it (Song, Meng, Ermon; ICLR 2021)."""
