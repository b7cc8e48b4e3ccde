"""Networks with the architecture of Stable Diffusion 1.5 and SDXL at random weights: nothing is downloaded.

Speed does not depend on weights. The configurations are the published ones, written down here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import underpaint_mini
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SD15_UNET: Mapping[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD15_VAE: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
CLIP_L: Mapping[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
SDXL_UNET: Mapping[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True, slots=True)
class Scale:
    """The sizes of one run."""

    name: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    sdxl: Mapping[str, Any]
    dtype: str
    """Of the network."""
    rows: tuple[int, ...]
    """Sizes of passes of the network alone."""
    sdxl_rows: tuple[int, ...]
    steps: int
    """Steps of an edit."""
    jobs: int
    """Edits at once on the saturated engine."""
    rounds: int
    round_s: float
    """Seconds that one measurement of a network takes."""
    load_s: float
    """Seconds for which edits arrive at nine tenths of what the engine can do."""
    matrix: int
    """Side of the matrices of the ceiling."""
    copied_bytes: int
    minutes: float
    """Time for all sections; what does not fit is skipped and said."""


def _smaller(config: Mapping[str, Any], **fields: Any) -> Mapping[str, Any]:
    return {**config, **fields}


FULL = Scale(
    "Stable Diffusion 1.5 at 512 px and SDXL at 1024 px", SD15_UNET, SD15_VAE, CLIP_L, SDXL_UNET, "bfloat16",
    rows=(2, 4, 8, 16, 32), sdxl_rows=(2, 4, 8), steps=50, jobs=16, rounds=3, round_s=0.4, load_s=40.0,
    matrix=8192, copied_bytes=4 << 30, minutes=8.5,
)  # fmt: skip
TINY = Scale(
    "tiny networks, to try the script",
    _smaller(
        SD15_UNET, sample_size=8, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    ),
    _smaller(
        SD15_VAE, block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, sample_size=16,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=8,
    ),
    _smaller(
        CLIP_L, vocab_size=1569, bos_token_id=1567, eos_token_id=1568, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=20, projection_dim=32,
    ),
    _smaller(
        SDXL_UNET, sample_size=8, layers_per_block=1, block_out_channels=(32, 64), attention_head_dim=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1), cross_attention_dim=32, norm_num_groups=8, addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    ),
    "float32",
    rows=(2, 8), sdxl_rows=(2,), steps=10, jobs=4, rounds=2, round_s=0.05, load_s=3.0, matrix=256,
    copied_bytes=1 << 24, minutes=3.0,
)  # fmt: skip


def save_pipeline(scale: Scale, device: torch.device, directory: Path) -> None:
    """Write a checkpoint with the first network of ``scale``, as a user would bring it."""
    torch.manual_seed(0)
    with device:
        unet = UNet2DConditionModel(**scale.unet)
        vae = AutoencoderKL(**scale.vae)
        text = CLIPTextModel(CLIPTextConfig(**scale.text))
    tokens = int(scale.text["max_position_embeddings"])
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(underpaint_mini.MODEL / "tokenizer", model_max_length=tokens),
        unet=unet.to(getattr(torch, scale.dtype)),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A U-Net, and random inputs for it."""

    unet: UNet2DConditionModel
    embeds_shape: tuple[int, int]
    added: Mapping[str, int] = field(default_factory=dict)
    """Further conditioning: name -> width."""

    @classmethod
    def sd15(cls, scale: Scale, device: torch.device) -> "Network":
        """The first network of ``scale``."""
        tokens = int(scale.text["max_position_embeddings"])
        return cls(_unet(scale.unet, scale.dtype, device), (tokens, int(scale.unet["cross_attention_dim"])))

    @classmethod
    def sdxl(cls, scale: Scale, device: torch.device) -> "Network":
        """The second network of ``scale``, which the service does not serve."""
        unet = _unet(scale.sdxl, scale.dtype, device)
        pooled = int(unet.config.projection_class_embeddings_input_dim) - 6 * int(unet.config.addition_time_embed_dim)
        return cls(unet, (77, int(unet.config.cross_attention_dim)), {"text_embeds": pooled, "time_ids": 6})

    def inputs(self, rows: int) -> tuple[Tensor, ...]:
        """Latents, timesteps, prompt embeddings and further conditioning for so many rows."""
        side, device, dtype = int(self.unet.config.sample_size), self.unet.device, self.unet.dtype
        return (
            torch.randn((rows, 4, side, side), device=device, dtype=dtype),
            torch.randint(1, 999, (rows,), device=device),
            torch.randn((rows, *self.embeds_shape), device=device, dtype=dtype),
            *(torch.randn((rows, width), device=device, dtype=dtype) for width in self.added.values()),
        )

    def __call__(self, latents: Tensor, timesteps: Tensor, embeds: Tensor, *added: Tensor) -> Tensor:
        """The network's output."""
        more = dict(zip(self.added, added, strict=True))
        out: Tensor = self.unet(
            latents, timesteps, embeds, added_cond_kwargs=more if more else None, return_dict=False
        )[0]
        return out

    def call(self, rows: int) -> Callable[[], Tensor]:
        """A call with inputs for so many rows."""
        return partial(self, *self.inputs(rows))

    @torch.inference_mode()
    def gflop(self) -> float:
        """Floating-point operations of one row in units of 1e9: of matrix products and convolutions."""
        with FlopCounterMode(display=False) as counter:
            self.call(1)()
        return float(counter.get_total_flops()) / 1e9


def _unet(config: Mapping[str, Any], dtype: str, device: torch.device) -> UNet2DConditionModel:
    torch.manual_seed(0)
    with device:
        unet = UNet2DConditionModel(**config)
    return unet.requires_grad_(False).eval().to(getattr(torch, dtype))
