"""EDICT: exact inversion through coupled latents, and the edit from it."""
