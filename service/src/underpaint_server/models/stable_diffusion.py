"""The family of Stable Diffusion 1.x and 2.x: text-conditioned latent diffusion in a diffusers pipeline directory.

What differs between its members (prediction type, scale of the latents, text encoder, precision variant of the files)
is settled here, once; everything above asks for epsilon and sees scaled latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from underpaint_server.diffusion.schedule import Schedule
from underpaint_server.errors import ModelNotReady
from underpaint_server.models import checkpoint, schedules
from underpaint_server.models.facts import About
from underpaint_server.models.libraries import AutoencoderKL, CLIPTextModel, CLIPTokenizer, UNet2DConditionModel
from underpaint_server.rows import Denoise, Embedded, PullBack, Pulled

METHODS = ("sdedit", "ddim", "edict", "diffedit", "disentangled", "content_injection")


@dataclass(frozen=True, slots=True, eq=False)
class StableDiffusion:
    """One checkpoint in memory. The autoencoder and the text encoder run in float32 whatever the network's dtype."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: Schedule
    prediction: schedules.Prediction
    digest: str

    @classmethod
    def load(cls, directory: Path, *, dtype: torch.dtype, device: torch.device) -> "StableDiffusion":
        """Read a pipeline directory; raises :class:`ModelNotReady`, saying what is wrong with it."""
        for part in ("vae", "text_encoder"):
            checkpoint.check_weights(directory / part)
        if not (directory / "tokenizer").is_dir():
            raise ModelNotReady(f"'{directory}/tokenizer' is missing: give the whole directory, as diffusers saves one")
        scheduler = checkpoint.config(directory / "scheduler" / "scheduler_config.json")
        unet = checkpoint.read(UNet2DConditionModel, directory / "unet", dtype)
        vae = checkpoint.read(AutoencoderKL, directory / "vae", torch.float32)
        text_encoder = checkpoint.read(CLIPTextModel, directory / "text_encoder", torch.float32)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(directory / "tokenizer", local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelNotReady(f"'{directory}/tokenizer' cannot be read: {error}") from error
        if unet.config.in_channels != vae.config.latent_channels:
            raise ModelNotReady(
                f"'{directory}': the U-Net takes {unet.config.in_channels} channels, not the "
                f"autoencoder's {vae.config.latent_channels}; inpainting networks are not supported"
            )
        for module in (unet, vae, text_encoder):
            module.requires_grad_(False).eval().to(device)
        return cls(
            unet,
            vae,
            text_encoder,
            tokenizer,
            schedules.schedule(scheduler),
            schedules.prediction(scheduler),
            checkpoint.digest(directory),
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the edit methods it can run: all."""
        return METHODS

    @property
    def latent_channels(self) -> int:
        """Of what the U-Net sees."""
        return int(self.unet.config.in_channels)

    @property
    def embeds_shape(self) -> tuple[int, int]:
        """(tokens, width) of a text's embedding."""
        return self.prompt_tokens, int(self.unet.config.cross_attention_dim)

    @property
    def vae_scale(self) -> int:
        """Pixels a latent is wide and high."""
        return 1 << (len(self.vae.config.block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        """Pixels that a side must be a multiple of, so that every level of the U-Net has whole sizes."""
        return self.vae_scale << (len(self.unet.config.block_out_channels) - 1)

    @property
    def native_px(self) -> tuple[int, int]:
        """(width, height) in pixels that the U-Net was made for."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return width * self.vae_scale, height * self.vae_scale

    @property
    def prompt_tokens(self) -> int:
        """Length of the text encoder's context, markers included."""
        return int(self.text_encoder.config.max_position_embeddings)

    @property
    def about(self) -> About:
        """What kind of checkpoint it is."""
        parts = {"network": self.unet, "autoencoder": self.vae, "text encoder": self.text_encoder}
        parameters = {name: sum(weights.numel() for weights in part.parameters()) for name, part in parts.items()}
        return About("stable-diffusion", self.prediction.value, parameters)

    def noise_preds(self, rows: list[Denoise]) -> Tensor:
        """(b, c, h, w), float64: epsilon of each row, one forward pass."""
        latents = torch.stack([row.latents for row in rows])
        return self._noise_preds(latents, torch.stack([row.prompt_embeds for row in rows]), rows)

    def pull_back(self, rows: list[PullBack]) -> list[Pulled]:
        """Vector-Jacobian products of each row's own evaluation: one pass forward and one back, with gradients on.

        No layer of the network mixes the images of a batch, so the derivative of the sum is each row's own.
        """
        latents = torch.stack([row.latents for row in rows]).requires_grad_()
        prompt_embeds = torch.stack([row.prompt_embeds for row in rows]).requires_grad_()
        noise_preds = self._noise_preds(latents, prompt_embeds, rows)
        cotangents = torch.stack([row.cotangent for row in rows])
        by_latents, by_embeds = torch.autograd.grad(noise_preds, (latents, prompt_embeds), cotangents)
        return [Pulled(x, c) for x, c in zip(by_latents, by_embeds.double(), strict=True)]

    def _noise_preds(self, latents: Tensor, prompt_embeds: Tensor, rows: Sequence[Denoise | PullBack]) -> Tensor:
        weight = self.unet.conv_in.weight  # the network's own .device and .dtype look through all modules, 1 ms each
        device, dtype = weight.device, weight.dtype
        timesteps = torch.tensor([row.timestep for row in rows], device=device)
        out: Tensor = self.unet(latents.to(dtype), timesteps, prompt_embeds.to(dtype), return_dict=False)[0].double()
        return schedules.to_epsilon(self.prediction, rows, latents, out)

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] to scaled latents (b, c, h, w), float64: the mean, no sample."""
        mean: Tensor = self.vae.encode(images.to(self.vae.device)).latent_dist.mode().double()
        return (mean - float(self.vae.config.shift_factor or 0)) * float(self.vae.config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (b, c, h, w) to images (b, 3, H, W), float32, cut to [-1, 1]."""
        return self._decode(latents).clamp(-1, 1)

    def pull_back_decode(self, latents: Tensor, cotangents: Tensor) -> Tensor:
        """(b, c, h, w), float64: vector-Jacobian products of the uncut decoding, with gradients on."""
        latents = latents.clone().requires_grad_()
        (by_latents,) = torch.autograd.grad(self._decode(latents), latents, cotangents)
        return by_latents

    def _decode(self, latents: Tensor) -> Tensor:
        unscaled = latents / float(self.vae.config.scaling_factor) + float(self.vae.config.shift_factor or 0)
        images: Tensor = self.vae.decode(unscaled.float(), return_dict=False)[0]
        return images

    def embed(self, texts: list[str]) -> list[Embedded]:
        """The texts' last hidden states, one pass; what does not fit the context is reported, not hidden."""
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=self.prompt_tokens, truncation=True, return_tensors="pt"
        )
        hidden = self.text_encoder(tokens["input_ids"].to(self.text_encoder.device)).last_hidden_state
        return [Embedded(h, self._dropped(text)) for h, text in zip(hidden, texts, strict=True)]

    def _dropped(self, text: str) -> str:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return str(self.tokenizer.decode(ids[self.prompt_tokens - 2 :])).strip()
