"""EDICT's way back as its paper has it (arXiv 2211.12446, equations 11 to 15), on stock diffusers and transformers.

Nothing of the server's code is in it; neither is the server's grid that it asks the network on, nor its batch sizes. So
it does not end at the very bits, but next to them, and only if the exported pair is what the paper says it is.
"""

import torch
import underpaint_mini
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

MIXING = 0.93


@torch.inference_mode()
def regenerate(x: Tensor, y: Tensor, prompt: str, *, steps: int, used: int, guidance_scale: float) -> Tensor:
    """The picture's latents (c, h, w) that the coupled pair stands for, float64."""
    unet = UNet2DConditionModel.from_pretrained(underpaint_mini.MODEL / "unet", torch_dtype=torch.float32)
    scheduler = DDIMScheduler.from_pretrained(underpaint_mini.MODEL / "scheduler")
    scheduler.set_timesteps(steps)
    texts = _embed(["", prompt])
    alphas = scheduler.alphas_cumprod.double()

    def step(one: Tensor, other: Tensor, t: int) -> Tensor:
        rows = other.float()[None].repeat(2, 1, 1, 1)
        plain, told = unet(rows, t, encoder_hidden_states=texts).sample.double()
        eps = plain + guidance_scale * (told - plain)
        before = t - scheduler.config.num_train_timesteps // steps
        now, clean = alphas[t], alphas[before] if before >= 0 else alphas[0]
        a = (clean / now).sqrt()
        paired: Tensor = a * one + ((1 - clean).sqrt() - a * (1 - now).sqrt()) * eps
        return paired

    for i, t in enumerate(scheduler.timesteps[-used:].tolist()):
        if i % 2 == 0:
            x = step(x, y, t)
            y = step(y, x, t)
        else:
            y = step(y, x, t)
            x = step(x, y, t)
        x = MIXING * x + (1 - MIXING) * y
        y = MIXING * y + (1 - MIXING) * x
    return x


def _embed(texts: list[str]) -> Tensor:
    tokenizer = CLIPTokenizer.from_pretrained(underpaint_mini.MODEL / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(underpaint_mini.MODEL / "text_encoder", dtype=torch.float32)
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    hidden: Tensor = encoder(tokens.input_ids).last_hidden_state
    return hidden
