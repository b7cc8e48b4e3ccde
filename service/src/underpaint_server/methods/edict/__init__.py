"""EDICT: exact inversion with coupled latents, and the edit from it (Wallace, Gokul, Naik; CVPR 2023)."""
