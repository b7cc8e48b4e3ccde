"""The same edits as a user of diffusers writes them: a loop around a U-Net and a scheduler, for a static batch.

Every edit of a batch has the same method, steps and strength; photos, prompts and seeds differ. Guidance is one pass of
both predictions. Noise is that of our server, so that the pictures can be compared. Where diffusers' own pipeline does
more work for the same edit (guidance in DiffEdit's mask), the loop does the less.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from underpaint_mini import MODEL
from underpaint_server.diffusion.noise import standard_normal

from benchmarks.peers.edits import GUIDANCE, MASK_STRENGTH, MIXING, SAMPLES, THRESHOLD, Edit, Pixels, pixels
from benchmarks.peers.networks import Network

LARGEST = 32
"""Most rows of a pass."""
OUTLIERS = 3.0
"""Multiple of a difference map's mean that larger values are clamped to."""


class Loops:
    """diffusers' autoencoder, text encoder and schedulers, and a U-Net run in some way; ``dtype`` is of all but it."""

    def __init__(self, network: Network, dtype: torch.dtype = torch.float32) -> None:
        self._network, self._dtype = network, dtype
        self._vae: Any = AutoencoderKL.from_pretrained(MODEL, subfolder="vae", torch_dtype=dtype).eval()
        self._text: Any = CLIPTextModel.from_pretrained(MODEL / "text_encoder", dtype=dtype).eval()
        self._tokenizer: Any = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
        self._scheduler: Any = DDIMScheduler.from_pretrained(MODEL, subfolder="scheduler")
        self._inverse: Any = DDIMInverseScheduler.from_config(self._scheduler.config)

    @torch.inference_mode()
    def run(self, edits: Sequence[Edit]) -> list[Pixels]:
        """The edited pictures of one static batch."""
        method, steps, strength = edits[0].kind
        assert all(edit.kind == edits[0].kind for edit in edits), "a static batch has one method and one schedule"
        self._scheduler.set_timesteps(steps)
        self._inverse.set_timesteps(steps)
        used = int(steps * strength + 1e-5)
        images = torch.stack([torch.from_numpy(pixels(edit.photo)).permute(2, 0, 1) for edit in edits])
        source = self._vae.encode(images.to(self._dtype) / 127.5 - 1).latent_dist.mode() * self._scale
        latents = getattr(self, f"_{method}")(source, edits, used)
        decoded = self._vae.decode((latents / self._scale).to(self._dtype), return_dict=False)[0]
        pictures = ((decoded.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        return list(pictures.contiguous().numpy())

    @property
    def _scale(self) -> float:
        return float(self._vae.config.scaling_factor)

    # --- the methods: encoded photos (b, c, h, w) to edited latents -------------------------------------------------

    def _sdedit(self, source: Tensor, edits: Sequence[Edit], used: int) -> Tensor:
        timesteps = self._scheduler.timesteps[-used:]
        noised = self._scheduler.add_noise(source, _noise(source, edits, "sdedit", 0), timesteps[:1])
        return self._denoise(noised, edits, timesteps)

    def _ddim(self, source: Tensor, edits: Sequence[Edit], used: int) -> Tensor:
        inverted = self._inverted(source, [edit.source_prompt for edit in edits], used)[-1]
        return self._denoise(inverted, edits, self._scheduler.timesteps[-used:])

    def _diffedit(self, source: Tensor, edits: Sequence[Edit], used: int) -> Tensor:
        mask = self._mask(source, edits)
        trajectory = self._inverted(source, [edit.source_prompt for edit in edits], used)
        latents, guidance = trajectory[-1], self._guidance(edits)
        for k, t in enumerate(self._scheduler.timesteps[-used:]):
            latents = self._scheduler.step(self._guided(latents, t, *guidance), t, latents).prev_sample
            latents = mask * latents + (1 - mask) * trajectory[used - 1 - k]
        return latents

    def _edict(self, source: Tensor, edits: Sequence[Edit], used: int) -> Tensor:
        p = MIXING
        towards, away, scale = self._guidance(edits)
        described = self._embeds([edit.source_prompt for edit in edits])
        levels = [(int(t), *self._coefficients(int(t))) for t in self._scheduler.timesteps[-used:]]
        x = y = source.double()
        for i, (t, a, b) in reversed(list(enumerate(levels))):
            y = (y - (1 - p) * x) / p
            x = (x - (1 - p) * y) / p
            if i % 2 == 0:
                y = (y - b * self._guided(x, t, described, away, scale)) / a
                x = (x - b * self._guided(y, t, described, away, scale)) / a
            else:
                x = (x - b * self._guided(y, t, described, away, scale)) / a
                y = (y - b * self._guided(x, t, described, away, scale)) / a
        for i, (t, a, b) in enumerate(levels):
            if i % 2 == 0:
                x = a * x + b * self._guided(y, t, towards, away, scale)
                y = a * y + b * self._guided(x, t, towards, away, scale)
            else:
                y = a * y + b * self._guided(x, t, towards, away, scale)
                x = a * x + b * self._guided(y, t, towards, away, scale)
            x = p * x + (1 - p) * y
            y = p * y + (1 - p) * x
        return x

    # --- parts of methods -------------------------------------------------------------------------------------------

    def _mask(self, source: Tensor, edits: Sequence[Edit]) -> Tensor:
        """DiffEdit's masks (b, 1, h, w): the difference of two predictions for the same noise, by its own mean."""
        used = int(self._scheduler.num_inference_steps * MASK_STRENGTH + 1e-5)
        t = self._scheduler.timesteps[-used]
        noised = [self._scheduler.add_noise(source, _noise(source, edits, "mask", k), t[None]) for k in range(SAMPLES)]
        target = self._embeds([edit.target_prompt for edit in edits])
        reference = self._embeds([""] * len(edits))
        rows = torch.cat([part for latents in noised for part in (latents, latents)])
        embeds = torch.cat([target, reference] * SAMPLES)
        predicted = self._predict(rows, t, embeds).float().reshape(SAMPLES, 2, len(edits), *source.shape[1:])
        difference = (predicted[:, 0] - predicted[:, 1]).abs().mean((0, 2))
        ceiling = OUTLIERS * difference.mean((1, 2), keepdim=True)
        inside: Tensor = (difference / ceiling).clamp(max=1) > THRESHOLD
        return inside[:, None].to(source.dtype)

    def _inverted(self, source: Tensor, prompts: Sequence[str], used: int) -> list[Tensor]:
        """The latents at each level of the inversion without guidance, the encoded photo first."""
        trajectory, embeds = [source], self._embeds(prompts)
        for t in self._inverse.timesteps[:used]:
            noise_pred = self._predict(trajectory[-1], t, embeds)
            trajectory.append(self._inverse.step(noise_pred, t, trajectory[-1]).prev_sample)
        return trajectory

    def _denoise(self, latents: Tensor, edits: Sequence[Edit], timesteps: Tensor) -> Tensor:
        guidance = self._guidance(edits)
        for t in timesteps:
            latents = self._scheduler.step(self._guided(latents, t, *guidance), t, latents).prev_sample
        return latents

    def _guidance(self, edits: Sequence[Edit]) -> tuple[Tensor, Tensor, float]:
        towards = self._embeds([edit.target_prompt for edit in edits])
        return towards, self._embeds([""] * len(edits)), GUIDANCE[edits[0].method]

    def _guided(self, latents: Tensor, t: Tensor | int, towards: Tensor, away: Tensor, scale: float) -> Tensor:
        both = self._predict(torch.cat([latents, latents]), t, torch.cat([away, towards]))
        unconditional, conditional = both.to(latents.dtype).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def _predict(self, latents: Tensor, t: Tensor | int, embeds: Tensor) -> Tensor:
        timesteps = torch.full((len(latents),), int(t))
        inputs = (torch.split(tensor, LARGEST) for tensor in (latents.float(), timesteps, embeds.float()))
        return torch.cat([self._network(*part) for part in zip(*inputs, strict=True)])

    def _embeds(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings (b, tokens, width); equal prompts are embedded once."""
        unique = list(dict.fromkeys(prompts))
        length = self._text.config.max_position_embeddings
        tokens = self._tokenizer(unique, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        hidden: Tensor = self._text(tokens["input_ids"]).last_hidden_state
        return hidden[[unique.index(prompt) for prompt in prompts]]

    def _coefficients(self, t: int) -> tuple[float, float]:
        """(a, b) of ``x' = a x + b noise``, the DDIM step from timestep t."""
        scheduler = self._scheduler
        before = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        alphas = scheduler.alphas_cumprod
        here, there = float(alphas[t]), float(alphas[before] if before >= 0 else scheduler.final_alpha_cumprod)
        a: float = (there / here) ** 0.5
        return a, (1 - there) ** 0.5 - a * (1 - here) ** 0.5


def _noise(source: Tensor, edits: Sequence[Edit], purpose: str, index: int) -> Tensor:
    shape = tuple(source.shape[1:])
    drawn = [standard_normal(shape, seed=edit.seed, purpose=purpose, index=index) for edit in edits]
    return torch.stack(drawn).to(source.dtype)
