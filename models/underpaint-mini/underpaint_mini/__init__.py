"""Weights of underpaint-mini as files: a small Stable Diffusion pipeline directory, its CLIP, and a DDPM beside it."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""A diffusers ``StableDiffusionPipeline`` directory."""

CLIP = Path(__file__).parent / "clip"
"""The directory of a transformers CLIP with its tokenizer."""

DDPM = Path(__file__).parent / "ddpm"
"""A diffusers ``DDPMPipeline`` directory: an unconditional model of small pictures."""
