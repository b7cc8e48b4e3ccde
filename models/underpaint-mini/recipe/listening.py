"""How well a U-Net predicts the noise on held-out composites, and how much it listens to the noun of a caption."""

from typing import Any

import torch

from recipe.captions import NOUN, TOKENS, sentence

FIFTHS = 5


@torch.no_grad()
def noise_errors(pipe: Any, images: torch.Tensor, facts: torch.Tensor, batch: int) -> dict[str, float]:
    """By fifths of the schedule, from little noise to much: the mean squared error of the predicted noise, and the
    share that a wrong noun in the caption adds to it.

    ``images`` (n, 3, 64, 64) in [-1, 1] and ``facts`` (n, 6); timesteps, noise and wrong nouns are the same for every
    pipeline.
    """
    n, rng = len(images), torch.Generator().manual_seed(4)
    wrong = facts.clone()
    wrong[:, NOUN] = facts[torch.randperm(n, generator=rng), NOUN]
    timesteps = torch.linspace(0, pipe.scheduler.config.num_train_timesteps - 1, n).long()
    clean = torch.cat([pipe.vae.encode(part).latent_dist.mode() for part in images.split(batch)])
    noise = torch.randn(clean.shape, generator=rng).to(clean.device)
    noisy = pipe.scheduler.add_noise(clean, noise, timesteps.to(clean.device))
    right, misled = (_errors(pipe, noisy, noise, timesteps, said, batch) for said in (facts, wrong))
    found = {f"noise error, fifth {i + 1} of the schedule": e.item() for i, e in enumerate(_fifths(right))}
    added = _fifths(misled) / _fifths(right) - 1
    return found | {f"a wrong noun adds, fifth {i + 1}": share.item() for i, share in enumerate(added)}


def _errors(
    pipe: Any, noisy: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, facts: torch.Tensor, batch: int
) -> torch.Tensor:
    captions = [sentence(row) for row in facts.tolist()]
    found = []
    for i in range(0, len(noisy), batch):
        part = slice(i, i + batch)
        ids = pipe.tokenizer(captions[part], padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
        states = pipe.text_encoder(ids.to(noisy.device)).last_hidden_state
        predicted = pipe.unet(noisy[part], timesteps[part].to(noisy.device), states).sample
        found.append((predicted - noise[part]).square().mean((1, 2, 3)))
    return torch.cat(found).cpu()


def _fifths(errors: torch.Tensor) -> torch.Tensor:
    return torch.stack([part.mean() for part in errors.tensor_split(FIFTHS)])
