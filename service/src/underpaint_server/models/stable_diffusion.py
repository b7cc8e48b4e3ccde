"""The Stable Diffusion family, 1.x and 2.x (Rombach et al., CVPR 2022): text-conditioned latent diffusion.

A checkpoint is a diffusers pipeline directory. This module handles what differs between checkpoints: prediction type,
scale of the latents, text encoder and precision of the files. Its callers see epsilon and scaled latents only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from underpaint_server.diffusion.schedule import Schedule
from underpaint_server.models import schedules
from underpaint_server.models.checkpoint import DIFFUSERS, TRANSFORMERS, Checkpoint
from underpaint_server.models.facts import About
from underpaint_server.models.graphs import (
    DECODER,
    ENCODER,
    TEXT_ENCODER,
    UNET,
    Axis,
    Function,
    Graph,
    Input,
    Wrapped,
    functions,
    latents,
)
from underpaint_server.models.networks import check_channels, check_conditioning, check_text, native_px, trained_size
from underpaint_server.models.tensors import finite, to_device
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
    graphs: Mapping[str, Graph]
    compute: dict[str, Function]

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
        check_channels(unet.config, vae.config)
        check_text(unet.config, text_encoder.config, tokenizer)
        check_conditioning(unet.config)
        sample_size, repaired = trained_size(unet.config)
        vae_scale = 1 << (len(vae.config.block_out_channels) - 1)
        native, rounded = native_px(unet.config, vae_scale, sample_size)
        for module in (unet, vae, text_encoder):
            module.requires_grad_(False).eval().to(device)
        remarks = (*reading.remarks, *repaired, *rounded, *checkpoint.remarks())
        digest = checkpoint.digest(reading.implied)
        graphs = _graphs(unet, vae, text_encoder)
        return cls(unet, vae, text_encoder, tokenizer, reading, native, digest, remarks, graphs, functions(graphs))

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
        return self.prompt_tokens, int(self.text_encoder.config.hidden_size)

    @property
    def vae_scale(self) -> int:
        """Pixels per latent in each direction."""
        return 1 << (len(self.vae.config.block_out_channels) - 1)

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
        return self._noise_preds(self.compute[UNET], latents, torch.stack([row.prompt_embeds for row in rows]), rows)

    def pull_back(self, rows: list[PullBack]) -> list[Pulled]:
        """Vector-Jacobian products of ``rows``, from one forward and one backward pass; needs grad mode.

        No layer of the U-Net mixes the images of a batch, so the gradient of the sum over rows is, row by row, that of
        each row's own evaluation.
        """
        latents = torch.stack([row.latents for row in rows]).requires_grad_()
        prompt_embeds = torch.stack([row.prompt_embeds for row in rows]).requires_grad_()
        noise_preds = self._noise_preds(self.graphs[UNET].module, latents, prompt_embeds, rows)
        cotangents = torch.stack([row.cotangent for row in rows])
        by_latents, by_embeds = torch.autograd.grad(noise_preds, (latents, prompt_embeds), cotangents)
        return [Pulled(x, c) for x, c in zip(by_latents, by_embeds.double(), strict=True)]

    def _noise_preds(
        self, unet: Function, latents: Tensor, prompt_embeds: Tensor, rows: Sequence[Denoise | PullBack]
    ) -> Tensor:
        weight = self.unet.conv_in.weight  # unet.device and unet.dtype search all modules, 1 ms each
        device, dtype = weight.device, weight.dtype
        timesteps = to_device(torch.tensor([row.timestep for row in rows]), device)
        out = unet(latents.to(dtype), timesteps, prompt_embeds.to(dtype)).double()
        return schedules.to_epsilon(self.reading.prediction, rows, latents, out)

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] to scaled latents (b, c, h, w), float64: the mean of the distribution."""
        mean = self.compute[ENCODER](images.to(self.vae.device)).double()
        finite(mean, "the autoencoder's encoder")
        return (mean - float(self.vae.config.shift_factor or 0)) * float(self.vae.config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (b, c, h, w) to images (b, 3, H, W), float32, clamped to [-1, 1]."""
        return self._decode(self.compute[DECODER], latents)

    def _decode(self, decoder: Function, latents: Tensor) -> Tensor:
        unscaled = latents / float(self.vae.config.scaling_factor) + float(self.vae.config.shift_factor or 0)
        return finite(decoder(unscaled.float()), "the autoencoder's decoder").clamp(-1, 1)

    def pull_back_decode(self, latents: Tensor, cotangents: Tensor) -> Tensor:
        """Vector-Jacobian products of :meth:`decode`, (b, c, h, w), float64; needs grad mode.

        ``cotangents`` (b, 3, H, W), float32, are gradients with respect to the images.
        """
        latents = latents.clone().requires_grad_()
        (by_latents,) = torch.autograd.grad(self._decode(self.graphs[DECODER].module, latents), latents, cotangents)
        return by_latents

    def embed(self, texts: list[str]) -> list[Embedded]:
        """The texts' last hidden states, from one pass, each with the end of its text that did not fit the context."""
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=self.prompt_tokens, truncation=True, return_tensors="pt"
        )
        hidden = self.compute[TEXT_ENCODER](to_device(tokens["input_ids"], self.text_encoder.device))
        finite(hidden, "the text encoder")
        return [Embedded(h, self._dropped(text)) for h, text in zip(hidden, texts, strict=True)]

    def _dropped(self, text: str) -> str:
        """The end of the caller's own text that begins with the first token that does not fit."""
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        over = spans["offset_mapping"][self.prompt_tokens - 2 :]
        return text[over[0][0] :].strip() if over else ""


def _graphs(unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> dict[str, Graph]:
    vae_scale = 1 << (len(vae.config.block_out_channels) - 1)
    unit = 1 << (len(unet.config.block_out_channels) - 1)
    tokens, width = int(text_encoder.config.max_position_embeddings), int(text_encoder.config.hidden_size)
    channels = int(unet.config.in_channels)
    timesteps, embeds = Input("timesteps", dtype=torch.int64), Input("prompt_embeds", (tokens, width), unet.dtype)
    images = Input("images", (3, Axis("height", vae_scale), Axis("width", vae_scale)))

    def denoise(latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        out: Tensor = unet(latents, timesteps, prompt_embeds, return_dict=False)[0]
        return out

    def encode(images: Tensor) -> Tensor:
        mean: Tensor = vae.encode(images).latent_dist.mode()
        return mean

    def decode(latents: Tensor) -> Tensor:
        decoded: Tensor = vae.decode(latents, return_dict=False)[0]
        return decoded

    def hidden_states(token_ids: Tensor) -> Tensor:
        hidden: Tensor = text_encoder(token_ids).last_hidden_state
        return hidden

    return {
        UNET: Graph(Wrapped(denoise, unet), (latents(channels, unit, unet.dtype), timesteps, embeds)),
        ENCODER: Graph(Wrapped(encode, vae), (images,)),
        DECODER: Graph(Wrapped(decode, vae), (latents(channels, 1),)),
        TEXT_ENCODER: Graph(Wrapped(hidden_states, text_encoder), (Input("token_ids", (tokens,), torch.int64),)),
    }
