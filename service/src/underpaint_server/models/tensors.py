"""Conversions between arrays (decoded pixels, the arrays of an inversion) and tensors, and checks of tensors."""

from collections.abc import Sequence
from hashlib import sha256
from math import inf, log10

import numpy as np
import torch
from torch import Tensor

from underpaint_server.diffusion import masks
from underpaint_server.errors import NonFiniteLatents
from underpaint_server.jobs import Inversion, Picture
from underpaint_server.models.facts import Facts


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, which is on the CPU, on the device; the copy is queued there, and nothing waits for it.

    A copy from memory that may be swapped out would first wait for all passes that were queued before it.
    """
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps pinned memory until it was copied


def column(numbers: Sequence[float], device: torch.device) -> Tensor:
    """One number for each image of a batch: (b, 1, 1, 1), float64, on the device."""
    return to_device(torch.tensor(numbers, dtype=torch.float64).reshape(-1, 1, 1, 1), device)


def image(picture: Picture) -> Tensor:
    """Pixels (H, W, 3), uint8, to an image (3, H, W), float32, [-1, 1], on the CPU."""
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 127.5 - 1


def picture(image: Tensor) -> Picture:
    """An image (3, H, W), float32, [-1, 1], to pixels (H, W, 3), uint8, rounded."""
    pixels: Picture = ((image.cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    return pixels


def latent_mask(mask: Picture, latents: Tensor, model: Facts) -> Tensor:
    """A mask (H, W), uint8, to the resolution of latents (c, h, w): float64, 0 or 1, on the device.

    A pixel is inside the mask from 128 on; a latent is 1 if any of its pixels is.
    """
    white = torch.from_numpy(np.ascontiguousarray(mask) >= 128).double()
    return to_device(masks.to_latent_size(white, *latents.shape[1:]), model.device)


def mask_picture(mask: Tensor, model: Facts) -> Picture:
    """A mask at latent resolution (h, w), in {0, 1}, to pixels (H, W), uint8, in {0, 255}."""
    height, width = mask.shape[0] * model.vae_scale, mask.shape[1] * model.vae_scale
    pixels: Picture = (masks.to_pixel_size(mask.cpu(), height, width) * 255).byte().contiguous().numpy()
    return pixels


def arrays(inversion: Inversion, model: Facts) -> dict[str, Tensor]:
    """The arrays of an inversion, copied to tensors on the model's device."""
    return {name: to_device(torch.from_numpy(array.copy()), model.device) for name, array in inversion.arrays.items()}


def digest(values: Tensor | Picture) -> bytes:
    """SHA-256 over type, shape and numbers of a tensor or array. It waits until a tensor's device has computed them."""
    array = np.ascontiguousarray(values.cpu().numpy() if isinstance(values, Tensor) else values)
    return sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).digest()


def psnr_db(one: Picture, other: Picture) -> float:
    """Peak signal-to-noise ratio of two uint8 images of one size, in dB; infinite if they are equal."""
    mse = float(np.square(one.astype(np.float64) - other.astype(np.float64)).mean())
    return inf if mse == 0 else 20 * log10(255) - 10 * log10(mse)


def check_finite(*tensors: Tensor, dtype: str) -> None:
    """Raise :class:`NonFiniteLatents` if any value is NaN or infinite; ``dtype`` is that of the network."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise NonFiniteLatents(
            "the latents became NaN or infinite; use fewer steps, a lower guidance_scale or, for EDICT, a "
            f"mixing_coefficient closer to 1{overflow_advice(dtype)}"
        )


def finite(values: Tensor, part: str) -> Tensor:
    """``values``, which ``part`` of a model returned; raises :class:`NonFiniteLatents` if any is NaN or infinite."""
    if not bool(values.isfinite().all()):
        raise NonFiniteLatents(
            f"{part} returned NaN or infinite numbers; use a lower guidance_scale or other prompts or, if every "
            "request fails so, check the model's weights"
        )
    return values


def overflow_advice(dtype: str) -> str:
    """What may help a network that overflows in this dtype, as the end of a sentence; empty for float32."""
    others = {"float16": "bfloat16 or --dtype float32", "bfloat16": "float32"}
    return f"; {dtype} may have overflowed: start the server with --dtype {others[dtype]}" if dtype in others else ""
