"""Disentangled edits: the embeddings of two prompts are mixed, with one weight per step (Wu et al., CVPR 2023)."""
