"""Checks of the configurations of networks: inputs and outputs, what belongs together, and the native size."""

from collections.abc import Mapping, Sequence
from math import isfinite
from re import match
from typing import Any

from underpaint_server.errors import ModelNotReady

_INPUTS = {
    "class_embed_type": "a class label",
    "num_class_embeds": "a class label",
    "time_cond_proj_dim": "the guidance scale as an input, as distilled networks do (LCM)",
    "addition_embed_type": "more than a text, as SDXL does",
    "encoder_hid_dim_type": "another conditioning than a text",
    "encoder_hid_dim": "another conditioning than a text",
}
"""Field of a U-Net's configuration -> the input that the network needs where the field is set, and would not get."""


def check_conditioning(config: Mapping[str, Any]) -> None:
    """Raise :class:`ModelNotReady` for a U-Net that needs an input besides latents, timestep and text."""
    for key, needed in _INPUTS.items():
        if config.get(key) is not None:
            raise ModelNotReady(
                f"unet/config.json: {key} is {config[key]!r}: the U-Net needs {needed}, which is not supported"
            )
    embedding = config.get("time_embedding_type", "positional")
    if embedding != "positional":
        raise ModelNotReady(
            f"unet/config.json: time_embedding_type is {embedding!r}: the U-Net expects continuous noise levels; give "
            "one with 'positional', for discrete timesteps"
        )


def native_px(config: Mapping[str, Any], vae_scale: int, sample_size: object) -> tuple[tuple[int, int], list[str]]:
    """(width, height) in pixels that a U-Net works at by default, and a remark where it is not ``sample_size``.

    ``sample_size`` is in latents, one number or [height, width]; ``vae_scale`` is in pixels per latent. Every level of
    the U-Net must halve the sides evenly, so they are rounded to the nearest multiple for which it does. Raises
    :class:`ModelNotReady` if it is no size.
    """
    pair: Sequence[object] = sample_size if isinstance(sample_size, list | tuple) else (sample_size, sample_size)
    sides = [side for side in pair if isinstance(side, int) and not isinstance(side, bool) and side > 0]
    if len(sides) != 2 or len(pair) != 2:
        raise ModelNotReady(
            f"unet/config.json: sample_size is {sample_size!r}; write the network's native size there, in latents"
        )
    unit = 1 << (len(config["block_out_channels"]) - 1)
    height, width = (max(1, (2 * side + unit) // (2 * unit)) * unit for side in sides)
    native = width * vae_scale, height * vae_scale
    trained = sides[1] * vae_scale, sides[0] * vae_scale
    if native == trained:
        return native, []
    return native, [
        f"unet/config.json: the network cannot halve its native size of {trained[0]} x {trained[1]} px evenly; "
        f"{native[0]} x {native[1]} px is used"
    ]


def check_channels(unet: Any, vae: Any) -> None:
    """Refuse a U-Net and an autoencoder, by their configurations, that do not belong together."""
    if unet.in_channels != vae.latent_channels:
        raise ModelNotReady(
            f"the U-Net takes {unet.in_channels} channels, but the autoencoder's latents have {vae.latent_channels}; "
            "inpainting networks are not supported: give the base model"
        )
    if unet.out_channels != unet.in_channels:
        raise ModelNotReady(
            f"the U-Net takes {unet.in_channels} channels and returns {unet.out_channels} (out_channels); give one "
            "that returns as many: learned variances are not supported"
        )
    if (vae.in_channels, vae.out_channels) != (3, 3):
        raise ModelNotReady(
            f"the autoencoder has {vae.in_channels} input and {vae.out_channels} output channels; give one with 3 and 3"
        )
    scale, shift = vae.scaling_factor, vae.shift_factor or 0
    if not (_is_number(scale) and isfinite(scale) and scale > 0 and _is_number(shift) and isfinite(shift)):
        raise ModelNotReady(
            f"vae/config.json: scaling_factor is {scale!r} and shift_factor {vae.shift_factor!r}; write the factor of "
            "its latents there, a number above 0: 0.18215 for Stable Diffusion 1.x and 2.x"
        )


def check_text(unet: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Refuse a U-Net and a text encoder, by their configurations, or a tokenizer that do not belong together."""
    width = unet.cross_attention_dim
    if {*(width if isinstance(width, list | tuple) else [width])} != {text_encoder.hidden_size}:
        raise ModelNotReady(
            f"the U-Net reads texts of width {width} (cross_attention_dim), but the text encoder's "
            f"have {text_encoder.hidden_size} (hidden_size): give the text encoder that the U-Net was trained with"
        )
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= text_encoder.vocab_size:
        raise ModelNotReady(
            f"the tokenizer has {largest + 1} tokens (len(tokenizer) {len(tokenizer)}), but the text encoder only "
            f"{text_encoder.vocab_size} (vocab_size): give the tokenizer that belongs to it, or resize its embeddings"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def trained_size(unet: Any) -> tuple[object, list[str]]:
    """The sample_size of a U-Net's configuration, repaired as the pipelines of diffusers do, and a remark if it was.

    Configurations that diffusers wrote before its version 0.9 have 32 for networks that were trained at 64.
    """
    size, written_by = unet.sample_size, unet.get("_diffusers_version")
    version = match(r"(\d+)\.(\d+)", str(written_by))
    if version is not None and (int(version[1]), int(version[2])) < (0, 9) and isinstance(size, int) and size < 64:
        return 64, [f"unet/config.json: sample_size {size} is read as 64, because diffusers {written_by} wrote it"]
    return size, []
