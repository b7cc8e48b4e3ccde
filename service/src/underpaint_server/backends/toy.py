"""A closed-form network for tests: exact answers in microseconds, with a real network's interface.

Its "data" are Gaussians around a mean that the text decides, for which the best noise prediction is known:
``eps = sqrt(1 - abar) (x - sqrt(abar) mu) / (abar var + 1 - abar)``. Its "autoencoder" averages 4 x 4 pixels.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from underpaint_server.backends.protocol import padded
from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.diffusion.schedule import Schedule, scaled_linear
from underpaint_server.errors import OutOfMemory
from underpaint_server.jobs import ModelInfo
from underpaint_server.models.facts import About, Facts
from underpaint_server.rows import Batch, Decode, Denoise, Embed, Embedded, Encode, Row
from underpaint_server.settings import Settings

SHAPE = (4, 8, 8)
SCALE = 4
VARIANCE = 0.25


class ToyBackend:
    """See the module. Where it is told not to be invariant, it adds 1e-7 a row of the pass to every answer."""

    def __init__(self, model_id: str, settings: Settings, *, invariant: bool = True) -> None:
        self._class = None if invariant else settings.exact_batch_class
        info = ModelInfo(
            id=model_id,
            digest=sha256(f"toy {invariant}".encode()).hexdigest(),
            dtype="float64",
            methods=("sdedit", "ddim", "edict", "diffedit"),
            width=SHAPE[2] * SCALE,
            height=SHAPE[1] * SCALE,
            size_multiple=2 * SCALE,
            default_steps=20,
            prompt_tokens=16,
            batch_class=self._class,
            fingerprint=f"toy-{self._class}",
        )
        schedule = Schedule(scaled_linear(), steps_offset=1)
        self.facts = Facts(info, schedule, SHAPE[0], SCALE, torch.device("cpu"), About("toy"))
        self.memory_rows: int | None = None
        """Rows that "fit the device"; None for no limit."""

    def predict(self, batch: Batch) -> Sequence[Any]:
        """See :class:`Backend`."""
        if self.memory_rows is not None and batch.size > self.memory_rows:
            raise OutOfMemory(f"{batch.size} rows do not fit the toy")
        return [self._answer(row, batch.size) for row in padded(batch.rows, batch.size)[: len(batch.rows)]]

    def batch_class(self, kind: type[Row], shape: tuple[int, ...]) -> int | None:
        """See :class:`Backend`."""
        return self._class if kind is Denoise else None

    def minimum(self, kind: type[Row]) -> int:
        """See :class:`Backend`."""
        return 1

    def memory_bytes(self) -> dict[str, int]:
        """See :class:`Backend`."""
        return {}

    def _answer(self, row: Row, size: int) -> Tensor | Embedded:
        match row:
            case Denoise(latents=x, alpha_bar=abar, prompt_embeds=mean):
                pull = (1 - abar) ** 0.5 / (abar * VARIANCE + 1 - abar)
                drift = 0.0 if self._class is None else 1e-7 * size
                noise_pred: Tensor = pull * (x - abar**0.5 * functional.interpolate(mean[None], x.shape[1:])[0]) + drift
                return noise_pred
            case Encode(image=image):
                small = functional.avg_pool2d(image[None].double(), SCALE)[0]
                return torch.cat([small, small.mean(0, keepdim=True)])
            case Decode(latents=z):
                return functional.interpolate(z[None, :3].float(), scale_factor=SCALE)[0].clamp(-1, 1)
            case Embed(text=text):
                words = text.split()
                seed = int.from_bytes(sha256(text.encode()).digest()[:6], "little")
                mean = standard_normal(SHAPE, seed=seed, purpose="toy") * (0.5 if text else 0.0)
                return Embedded(mean, " ".join(words[self.facts.info.prompt_tokens :]))
