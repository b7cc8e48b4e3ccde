"""The Stable Diffusion family, 1.x and 2.x (Rombach et al., CVPR 2022): text-conditioned latent diffusion.

A checkpoint is a diffusers pipeline directory. This module handles what differs between checkpoints: prediction type,
scale of the latents, text encoder and precision of the files. Its callers see epsilon and scaled latents only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from re import match
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from underpaint_server.diffusion.schedule import Schedule
from underpaint_server.errors import ModelNotReady
from underpaint_server.models import schedules
from underpaint_server.models.checkpoint import DIFFUSERS, TRANSFORMERS, Checkpoint
from underpaint_server.models.facts import About
from underpaint_server.models.networks import check_conditioning, native_px
from underpaint_server.models.tensors import finite
from underpaint_server.rows import Denoise, Embedded, PullBack, Pulled

transformers_logging.disable_progress_bar()


@dataclass(frozen=True, slots=True, eq=False)
class StableDiffusion:
    """One loaded checkpoint; see :class:`underpaint_server.models.families.Family`.

    The autoencoder and the text encoder run in float32, whatever the dtype of the U-Net.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    reading: schedules.Reading
    native_px: tuple[int, int]
    digest: str
    remarks: tuple[str, ...]

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> "StableDiffusion":
        """Load a pipeline directory, the U-Net in ``dtype``; raises :class:`ModelNotReady` if it cannot be used."""
        reading = schedules.read(checkpoint.scheduler(), checkpoint.named_class("scheduler"), latent=True)
        kind = checkpoint.config("text_encoder/config.json").get("model_type")
        checkpoint.check_class("text_encoder", ["clip_text_model", "clip"], kind)
        unet = checkpoint.model("unet", UNet2DConditionModel, DIFFUSERS, dtype)
        vae = checkpoint.model("vae", AutoencoderKL, DIFFUSERS, torch.float32)
        text_encoder = checkpoint.model("text_encoder", CLIPTextModel, TRANSFORMERS, torch.float32)
        tokenizer = checkpoint.tokenizer("tokenizer", CLIPTokenizer)
        _check_channels(unet.config, vae.config)
        _check_text(unet.config, text_encoder.config, tokenizer)
        check_conditioning(unet.config)
        sample_size, repaired = _sample_size(unet.config)
        native, rounded = native_px(unet.config, _vae_scale(vae), sample_size)
        for module in (unet, vae, text_encoder):
            module.requires_grad_(False).eval().to(device)
        remarks = (*reading.remarks, *repaired, *rounded, *checkpoint.remarks())
        digest = checkpoint.digest(reading.implied)
        return cls(unet, vae, text_encoder, tokenizer, reading, native, digest, remarks)

    @property
    def schedule(self) -> Schedule:
        """The noise schedule that the U-Net was trained with."""
        return self.reading.schedule

    @property
    def latent_channels(self) -> int:
        """Channels of latents."""
        return int(self.unet.config.in_channels)

    @property
    def embeds_shape(self) -> tuple[int, int]:
        """(tokens, width) of prompt embeddings."""
        return self.prompt_tokens, int(self.unet.config.cross_attention_dim)

    @property
    def vae_scale(self) -> int:
        """Pixels per latent in each direction."""
        return _vae_scale(self.vae)

    @property
    def size_multiple(self) -> int:
        """Image sides must be multiples of this many pixels, so that every level of the U-Net halves evenly."""
        return self.vae_scale << (len(self.unet.config.block_out_channels) - 1)

    @property
    def prompt_tokens(self) -> int:
        """Length of the text encoder's context, start and end tokens included."""
        return int(self.text_encoder.config.max_position_embeddings)

    @property
    def about(self) -> About:
        """Description of the checkpoint."""
        parts = {"network": self.unet, "autoencoder": self.vae, "text encoder": self.text_encoder}
        parameters = {name: sum(weights.numel() for weights in part.parameters()) for name, part in parts.items()}
        return About("stable-diffusion", self.reading.prediction.value, parameters, self.remarks)

    def noise_preds(self, rows: list[Denoise]) -> Tensor:
        """Epsilon of each row, (b, c, h, w), float64, from one forward pass."""
        latents = torch.stack([row.latents for row in rows])
        return self._noise_preds(latents, torch.stack([row.prompt_embeds for row in rows]), rows)

    def pull_back(self, rows: list[PullBack]) -> list[Pulled]:
        """Vector-Jacobian products of ``rows``, from one forward and one backward pass; needs grad mode.

        No layer of the U-Net mixes the images of a batch, so the gradient of the sum over rows is, row by row, that of
        each row's own evaluation.
        """
        latents = torch.stack([row.latents for row in rows]).requires_grad_()
        prompt_embeds = torch.stack([row.prompt_embeds for row in rows]).requires_grad_()
        noise_preds = self._noise_preds(latents, prompt_embeds, rows)
        cotangents = torch.stack([row.cotangent for row in rows])
        by_latents, by_embeds = torch.autograd.grad(noise_preds, (latents, prompt_embeds), cotangents)
        return [Pulled(x, c) for x, c in zip(by_latents, by_embeds.double(), strict=True)]

    def _noise_preds(self, latents: Tensor, prompt_embeds: Tensor, rows: Sequence[Denoise | PullBack]) -> Tensor:
        weight = self.unet.conv_in.weight  # unet.device and unet.dtype search all modules, 1 ms each
        device, dtype = weight.device, weight.dtype
        timesteps = torch.tensor([row.timestep for row in rows], device=device)
        out: Tensor = self.unet(latents.to(dtype), timesteps, prompt_embeds.to(dtype), return_dict=False)[0].double()
        return schedules.to_epsilon(self.reading.prediction, rows, latents, out)

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] to scaled latents (b, c, h, w), float64: the mean of the distribution."""
        mean: Tensor = self.vae.encode(images.to(self.vae.device)).latent_dist.mode().double()
        finite(mean, "the autoencoder's encoder")
        return (mean - float(self.vae.config.shift_factor or 0)) * float(self.vae.config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (b, c, h, w) to images (b, 3, H, W), float32, clamped to [-1, 1]."""
        return finite(self._decode(latents), "the autoencoder's decoder").clamp(-1, 1)

    def pull_back_decode(self, latents: Tensor, cotangents: Tensor) -> Tensor:
        """Vector-Jacobian products of decoding before the clamp, (b, c, h, w), float64; needs grad mode.

        ``cotangents`` (b, 3, H, W), float32, are gradients with respect to the images.
        """
        latents = latents.clone().requires_grad_()
        (by_latents,) = torch.autograd.grad(self._decode(latents), latents, cotangents)
        return by_latents

    def _decode(self, latents: Tensor) -> Tensor:
        unscaled = latents / float(self.vae.config.scaling_factor) + float(self.vae.config.shift_factor or 0)
        images: Tensor = self.vae.decode(unscaled.float(), return_dict=False)[0]
        return images

    def embed(self, texts: list[str]) -> list[Embedded]:
        """The texts' last hidden states, from one pass, each with the end of its text that did not fit the context."""
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=self.prompt_tokens, truncation=True, return_tensors="pt"
        )
        hidden = self.text_encoder(tokens["input_ids"].to(self.text_encoder.device)).last_hidden_state
        finite(hidden, "the text encoder")
        return [Embedded(h, self._dropped(text)) for h, text in zip(hidden, texts, strict=True)]

    def _dropped(self, text: str) -> str:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return str(self.tokenizer.decode(ids[self.prompt_tokens - 2 :])).strip()


def _vae_scale(vae: AutoencoderKL) -> int:
    return 1 << (len(vae.config.block_out_channels) - 1)


def _check_channels(unet: Any, vae: Any) -> None:
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


def _check_text(unet: Any, text_encoder: Any, tokenizer: CLIPTokenizer) -> None:
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


def _sample_size(unet: Any) -> tuple[object, list[str]]:
    """The sample_size of a U-Net's configuration, repaired as the pipelines of diffusers do, and a remark if it was.

    Configurations that diffusers wrote before its version 0.9 have 32 for networks that were trained at 64.
    """
    size, written_by = unet.sample_size, unet.get("_diffusers_version")
    version = match(r"(\d+)\.(\d+)", str(written_by))
    if version is not None and (int(version[1]), int(version[2])) < (0, 9) and isinstance(size, int) and size < 64:
        return 64, [f"unet/config.json: sample_size {size} is read as 64, because diffusers {written_by} wrote it"]
    return size, []
