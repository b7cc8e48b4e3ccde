"""One small edit at start, so that a checkpoint which cannot do any is refused then and not by its first caller."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256

import torch

from underpaint_server import __version__, cache
from underpaint_server.backends.exactness import describe
from underpaint_server.diffusion.ddim import add_noise
from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.diffusion.schedule import Level
from underpaint_server.errors import ModelNotReady, NonFiniteLatents
from underpaint_server.models.families import Family
from underpaint_server.models.tensors import finite, overflow_advice
from underpaint_server.rows import Denoise
from underpaint_server.settings import Settings

TEXTS = ["a red apple on a table", ""]
"""Prompts of the two rows of the network's pass."""
SIDE = 32
"""Largest side of the latents. They are smaller than the model's own, because a part that does not work does not work
at any size, and a large autoencoder takes most of the time."""
NOISE = (0.9, 0.1)
"""Timesteps of the two rows, as shares of the schedule."""
PLAUSIBLE = 1e4
"""Largest absolute value of predicted standard normal noise that a network may return."""


def try_once(model: Family, settings: Settings, note: Callable[[str], None]) -> None:
    """:func:`try_one_edit`, unless it succeeded before with the same checkpoint, number format, kind of device and
    versions, which is kept in the cache directory. ``note`` is told if it does."""
    facts = (__version__, torch.__version__, model.digest, model.unet.dtype, describe(model.unet.device))
    text = "\n".join(map(str, facts))
    name = f"tried/{sha256(text.encode()).hexdigest()[:32]}"
    with suppress(OSError):
        if cache.read(settings, name) == text.encode():
            return
    note("trying one small edit")
    try_one_edit(model)
    cache.write(settings, name, text)


def try_one_edit(model: Family) -> None:
    """Embed two texts, encode an image, predict its noise at two levels, and decode it.

    Raises :class:`ModelNotReady` with the part that fails, or that returns NaN or infinite numbers.
    """
    dtype = str(model.unet.dtype).removeprefix("torch.")
    unit = model.size_multiple // model.vae_scale
    height, width = (min(side // model.vae_scale, -(-SIDE // unit) * unit) for side in reversed(model.native_px))
    ramp = torch.linspace(-1, 1, width * model.vae_scale).expand(1, 3, height * model.vae_scale, -1)
    with torch.inference_mode():
        with _checked("the text encoder"):
            embeds = [embedded.prompt_embeds for embedded in model.embed(TEXTS)]
        with _checked("the autoencoder's encoder"):
            latents = model.encode(ramp)[0]
        if latents.shape != (expected := (model.latent_channels, height, width)):
            raise ModelNotReady(f"the autoencoder's latents are of shape {tuple(latents.shape)}, not {expected}")
        noise = standard_normal(tuple(latents.shape), seed=0, purpose="trial").to(latents.device)
        last = len(model.schedule.alphas_cumprod) - 1
        levels = [Level(t, model.schedule.alphas_cumprod[t]) for t in (round(share * last) for share in NOISE)]
        rows = [
            Denoise(add_noise(latents, noise, level), level.timestep, level.alpha_bar, prompt_embeds)
            for level, prompt_embeds in zip(levels, embeds, strict=True)
        ]
        with _checked("the network", overflow_advice(dtype)):
            largest = float(finite(model.noise_preds(rows), "the network").abs().max())
        if largest > PLAUSIBLE:
            raise ModelNotReady(
                f"the network predicts noise of up to {largest:.0e} where it has about 1: its weights are damaged or "
                "were converted wrongly, or its scheduler_config.json belongs to another network"
            )
        with _checked("the autoencoder's decoder"):
            model.decode(latents[None])


@contextmanager
def _checked(part: str, advice: str = "") -> Iterator[None]:
    try:
        yield
    except torch.AcceleratorError:
        raise
    except NonFiniteLatents as error:
        cause = advice or "; its weights are damaged or were converted wrongly: copy or convert them again"
        raise ModelNotReady(f"{part} returns NaN or infinite numbers{cause}") from error
    except torch.OutOfMemoryError as error:
        raise ModelNotReady(
            f"{part} does not fit in the device's memory; use a --dtype of half precision or another device"
        ) from error
    except Exception as error:  # what a library raises for weights that do not belong together is of any class
        raise ModelNotReady(f"{part} cannot compute a small edit; the server log has the cause") from error
