"""The family of Stable Diffusion 1.x and 2.x: text-conditioned latent diffusion in a diffusers pipeline directory.

What differs between its members (prediction type, scale of the latents, text encoder, precision variant of the files)
is settled here, once; everything above asks for epsilon and sees scaled latents.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from underpaint_server.diffusion.ddim import epsilon_from_v, epsilon_from_x0
from underpaint_server.diffusion.schedule import Schedule
from underpaint_server.errors import ModelNotReady
from underpaint_server.models import checkpoint, schedules
from underpaint_server.models.facts import About
from underpaint_server.rows import Denoise, Embedded

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")


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
        pipeline = checkpoint.config(directory, "model_index.json").get("_class_name")
        if pipeline not in PIPELINES:
            raise ModelNotReady(f"'{directory}' holds a {pipeline}; this server reads {', '.join(PIPELINES[:1])}")
        scheduler = checkpoint.config(directory, "scheduler/scheduler_config.json")
        for part in ("vae", "text_encoder"):
            checkpoint.check_weights(directory / part)
        if not (directory / "tokenizer").is_dir():
            raise ModelNotReady(f"'{directory}/tokenizer' is missing: give the whole directory, as diffusers saves one")
        try:
            unet = _read(UNet2DConditionModel, directory / "unet", dtype)
            vae = _read(AutoencoderKL, directory / "vae", torch.float32)
            text_encoder = _read(CLIPTextModel, directory / "text_encoder", torch.float32)
            tokenizer = CLIPTokenizer.from_pretrained(directory / "tokenizer", local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelNotReady(f"'{directory}' cannot be read: {error}") from error
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
        weight = self.unet.conv_in.weight  # the network's own .device and .dtype look through all modules, 1 ms each
        device, dtype = weight.device, weight.dtype
        latents = torch.stack([row.latents for row in rows])
        timesteps = torch.tensor([row.timestep for row in rows], device=device)
        prompt_embeds = torch.stack([row.prompt_embeds for row in rows])
        out: Tensor = self.unet(latents.to(dtype), timesteps, prompt_embeds.to(dtype), return_dict=False)[0].double()
        if self.prediction is schedules.Prediction.EPSILON:
            return out
        to_epsilon = epsilon_from_v if self.prediction is schedules.Prediction.V else epsilon_from_x0
        return torch.stack([to_epsilon(row.latents, pred, row.alpha_bar) for row, pred in zip(rows, out, strict=True)])

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] to scaled latents (b, c, h, w), float64: the mean, no sample."""
        mean: Tensor = self.vae.encode(images.to(self.vae.device)).latent_dist.mode().double()
        return (mean - float(self.vae.config.shift_factor or 0)) * float(self.vae.config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (b, c, h, w) to images (b, 3, H, W), float32, cut to [-1, 1]."""
        unscaled = latents / float(self.vae.config.scaling_factor) + float(self.vae.config.shift_factor or 0)
        images: Tensor = self.vae.decode(unscaled.float(), return_dict=False)[0]
        return images.clamp(-1, 1)

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


def _read(kind: Any, directory: Path, dtype: torch.dtype) -> Any:
    halves = sorted(directory.glob("*.fp16.safetensors"))
    whole = [file for file in directory.glob("*.safetensors") if ".fp16." not in file.name]
    variant = {"variant": "fp16"} if halves and not whole else {}
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True} | variant
    module, found = kind.from_pretrained(directory, dtype=dtype, **options)
    if found["missing_keys"]:  # the libraries would fill these with random numbers
        raise ModelNotReady(f"'{directory}' lacks {', '.join(sorted(found['missing_keys'])[:3])}: copy it again, whole")
    return module
