"""Weights of underpaint-mini as files: a small Stable Diffusion pipeline directory and its CLIP."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""A diffusers ``StableDiffusionPipeline`` directory."""

CLIP = Path(__file__).parent / "clip"
"""A transformers ``CLIPModel`` directory with its tokenizer."""
