"""Checks of a U-Net's configuration that both families share: its inputs, and the size that it was trained at."""

from collections.abc import Mapping, Sequence
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
