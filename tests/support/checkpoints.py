"""Tiny pipeline directories with random weights, as a user would bring them."""

import json
import shutil
from pathlib import Path

import torch
import underpaint_mini
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers import StableDiffusionPipeline as Pipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 20
PX = 48
"""Pixels of a side: latents are 12 x 12, four pixels each."""
DDPM_PX = 16
"""Pixels of a side in the family that works on pixels."""


def build(directory: Path, *, prediction_type: str = "epsilon", seed: int = 0, **unet: object) -> Path:
    """Write such a directory and return it; ``v_prediction`` makes it one of the 2.x kind (linear projections too)."""
    torch.manual_seed(seed)
    second = prediction_type == "v_prediction"
    fields = {
        "sample_size": PX // 4,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": (4, 8) if second else 8,
        "norm_num_groups": 8,
        "use_linear_projection": second,
    }
    network = UNet2DConditionModel(**(fields | unet))
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        latent_channels=4,
        sample_size=PX,
        scaling_factor=0.18215,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=1569,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=1567,
            eos_token_id=1568,
            pad_token_id=1568,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    tokenizer = CLIPTokenizer.from_pretrained(underpaint_mini.MODEL / "tokenizer", model_max_length=TOKENS)
    Pipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=network,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)
    return directory


def build_ddpm(directory: Path, *, seed: int = 0, prediction_type: str = "epsilon", **unet: object) -> Path:
    """Write a directory of the pixel-space family; its scheduler's defaults are those of published ones."""
    torch.manual_seed(seed)
    fields = {
        "sample_size": DDPM_PX,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    network = UNet2DModel(**(fields | unet))
    DDPMPipeline(network, DDPMScheduler(prediction_type=prediction_type)).save_pretrained(directory)
    return directory


def flattened(directory: Path) -> Path:
    """The same with all files in one place, as the oldest published ones have them."""
    for file in [*directory.glob("unet/*"), *directory.glob("scheduler/*")]:
        file.rename(directory / file.name)
    for part in ("unet", "scheduler"):
        (directory / part).rmdir()
    return directory


def without(directory: Path, *patterns: str) -> Path:
    """A copy beside it that lacks the files of these patterns."""
    copy = directory.with_name(directory.name + "-without")
    shutil.copytree(directory, copy)
    for pattern in patterns:
        for file in copy.glob(pattern):
            file.unlink()
    return copy


def without_tensor(directory: Path, file: str, name: str) -> Path:
    """A copy beside it whose ``file`` lacks the tensor ``name``."""
    copy = directory.with_name(directory.name + "-damaged")
    shutil.copytree(directory, copy)
    tensors = load_file(copy / file)
    del tensors[name]
    save_file(tensors, copy / file, metadata={"format": "pt"})
    return copy


def scale(file: Path, name: str, factor: float) -> None:
    """Multiply one tensor of a file in place."""
    tensors = load_file(file)
    tensors[name] = tensors[name] * factor
    save_file(tensors, file, metadata={"format": "pt"})


def fill(file: Path, name: str, value: float) -> None:
    """Set all numbers of one tensor of a file in place."""
    tensors = load_file(file)
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, file, metadata={"format": "pt"})


def configured(directory: Path, file: str, **values: object) -> Path:
    """Set fields of a configuration file in place; ``...`` removes one. Returns the directory."""
    path = directory / file
    fields = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))
    return directory


def scheduled(directory: Path, **values: object) -> Path:
    """Set fields of scheduler_config.json in place; ``_class_name`` is named by model_index.json too."""
    if "_class_name" in values:
        configured(directory, "model_index.json", scheduler=["diffusers", values["_class_name"]])
    return configured(directory, "scheduler/scheduler_config.json", **values)


def save_lora(file: Path) -> None:
    """Write a LoRA as diffusers names its tensors."""
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    save_file({key: torch.zeros(4, 64)}, file, metadata={"format": "pt"})
