"""Changes to composites that leave their captions true, so that a judge reads shapes and not pixels."""

from dataclasses import replace

import torch
from torch.nn import functional

from recipe.data import Scenes

STEP_BOUNDS = (0.002, 0.004, 0.008, 0.012, 0.016, 0.024, 0.032, 0.048, 0.064, 0.1, 0.15, 0.2, 0.3, 0.5)
GREY = torch.tensor([0.299, 0.587, 0.114])


def warp(scenes: Scenes, rng: torch.Generator, turn: float = 0.2, stretch: float = 0.18) -> Scenes:
    """Each sprite turned by up to ``turn`` radians, and its width and height scaled by up to ``stretch``."""
    u = torch.rand(3, len(scenes), generator=rng) * 2 - 1
    angle = u[0] * turn
    cos, sin = angle.cos(), angle.sin()
    spin = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    scale = torch.exp(u[1:] * stretch).T[:, None, :]
    linear = scenes.theta[:, :, :2] @ spin * scale
    return replace(scenes, theta=torch.cat([linear, scenes.theta[:, :, 2:]], 2))


def tint(n: int, rng: torch.Generator, turn: float = 0.15, grey: float = 0.25, light: float = 0.12) -> torch.Tensor:
    """Colour mixing matrices (n, 3, 3): hue turned a little, colours paler, all lighter or darker."""
    u = torch.rand(3, n, generator=rng) * 2 - 1
    angle = (u[0] * turn)[:, None, None]
    white = torch.full((3, 3), 1 / 3)
    third = 1 / 3**0.5
    cross = torch.tensor([[0.0, -third, third], [third, 0.0, -third], [-third, third, 0.0]])
    spin = white + angle.cos() * (torch.eye(3) - white) + angle.sin() * cross
    paler = (u[1].clamp_min(0) * grey)[:, None, None]
    return (1 + u[2] * light)[:, None, None] * ((1 - paler) * spin + paler * GREY.expand(3, 3))


def weather(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Blur a third of the images and add noise to half of them, so that a judge also reads imperfect pictures.

    ``rng`` is on the images' device.
    """
    pick, amount = torch.rand(2, len(images), 1, 1, 1, generator=rng, device=images.device)
    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise = torch.randn(images.shape, generator=rng, device=images.device)
    strength: torch.Tensor = (amount - 0.5).clamp_min(0) * 0.4
    return torch.where(pick < 0.35, blurred, images) + strength * noise


def repaint(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Every image in other colours: its channels mixed at random, for half of them its brightness alone, drawn in two.

    What is left is shape, the one thing that all drawings of a name share. ``rng`` is on the images' device.
    """
    u = torch.randn(len(images), 3, 5, generator=rng, device=images.device)
    mix = torch.where(u[:, :1, 3:4] > 0, u[:, :, :3], u[:, :, :1] * GREY.to(images.device) * 2)
    return (torch.einsum("nij,njhw->nihw", mix, images) + 0.3 * u[:, :, 4, None, None]).clamp(-1, 1)


def cover(images: torch.Tensor, rng: torch.Generator, share: float = 0.4, most: int = 24) -> torch.Tensor:
    """A rectangle of up to ``most`` pixels a side of a ``share`` of the images in one random colour.

    A judge that must do without any one part of an icon learns all of them. ``rng`` is on the images' device.
    """
    n, _, height, width = images.shape
    u = torch.rand(8, n, 1, 1, generator=rng, device=images.device)
    y, x = torch.arange(height, device=images.device)[:, None], torch.arange(width, device=images.device)
    covered = (u[0] < share) & _within(y, u[1] * height, u[2] * most) & _within(x, u[3] * width, u[4] * most)
    return torch.where(covered[:, None], u[5:].transpose(0, 1) * 2 - 1, images)


def _within(at: torch.Tensor, middle: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    return (at - middle).abs() * 2 < length


def splice(
    images: torch.Tensor, style: torch.Tensor, n: int, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """``n`` of the images, each with its right or its lower half from another of the same style; and their styles.

    Neither names what is shown, and together they still show the style: a judge that reads these knows styles by how
    they are drawn, not by heart. ``style`` (images,) is on the CPU. An image alone in its style stays whole.
    """
    picked = torch.randperm(len(images), generator=rng)[:n]
    same = (style[picked, None] == style).float()
    same[torch.arange(n), picked] = 1e-9
    other = images[torch.multinomial(same, 1, generator=rng)[:, 0].to(images.device)]
    spliced, half = images[picked.to(images.device)], images.shape[-1] // 2
    spliced[::2, :, :, half:] = other[::2, :, :, half:]
    spliced[1::2, :, half:] = other[1::2, :, half:]
    return spliced, style[picked]


def palette(images: torch.Tensor) -> torch.Tensor:
    """How often each of 216 colours and each of 45 sizes of step between neighbours occurs, (n, 261): square roots.

    By nothing else, a small classifier tells three quarters of the held-out pictures' styles.
    """
    x = (images + 1) / 2
    level = (x * 5.999).clamp(0, 5).long()
    colours = (level[:, 0] * 36 + level[:, 1] * 6 + level[:, 2]).flatten(1)
    steps = [x.diff(dim=-1), x.diff(dim=-2), x.diff(n=2, dim=-1)]
    bounds = torch.tensor(STEP_BOUNDS, device=images.device)
    sizes = [torch.bucketize(step.abs().amax(1).flatten(1), bounds, right=True) for step in steps]
    counts = [_shares(colours, 6**3), *(_shares(size, len(STEP_BOUNDS) + 1) for size in sizes)]
    return torch.cat(counts, 1).sqrt()


def _shares(codes: torch.Tensor, count: int) -> torch.Tensor:
    share = torch.full(codes.shape, 1 / codes.shape[1], device=codes.device)
    return torch.zeros(len(codes), count, device=codes.device).scatter_add_(1, codes, share)
