"""Backend with a closed-form network, for tests: a row takes microseconds.

The data distribution is a Gaussian with variance var, whose mean mu is drawn from a hash of the text. Its optimal noise
prediction is ``eps = sqrt(1 - abar) (x - sqrt(abar) mu) / (abar var + 1 - abar)``, with abar for alpha_bar. The
activations of the feature sites are ``x - sqrt(abar) mu``, at half resolution for "mid" and full resolution for "up_0".
The autoencoder averages 4 x 4 pixels.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from underpaint_server import __version__
from underpaint_server.backends.exactness import Key, Survey, Verdict, establish
from underpaint_server.backends.invariance import Network
from underpaint_server.backends.protocol import padded
from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.diffusion.schedule import Schedule, scaled_linear
from underpaint_server.errors import OutOfMemory
from underpaint_server.jobs import Exactness, ModelInfo
from underpaint_server.methods import methods_for
from underpaint_server.models.facts import About, Facts
from underpaint_server.rows import (
    Batch,
    Captured,
    Decode,
    Denoise,
    Embed,
    Embedded,
    Encode,
    PullBack,
    PullBackDecode,
    Pulled,
    Row,
    Score,
    Scored,
    is_network_row,
)
from underpaint_server.settings import Settings

SHAPE = (4, 8, 8)
"""Native latents, (c, h, w)."""
SCALE = 4
"""Pixels per latent in each direction."""
ALPHAS = scaled_linear()
"""alpha_bar of each timestep."""
VARIANCE = 0.25
"""Variance of the data distribution."""


def _pull(abar: float) -> float:
    return float((1 - abar) ** 0.5 / (abar * VARIANCE + 1 - abar))


def _residual(x: Tensor, abar: float, mean: Tensor) -> Tensor:
    residual: Tensor = x - abar**0.5 * functional.interpolate(mean[None], x.shape[1:])[0]
    return residual


def _score(row: Score) -> Scored:
    """The loss with the mean colour as embedding (in place of CLIP) and the pixels as content features."""
    text_change = _mean(row.target_text)[:3].mean((1, 2)) - _mean(row.source_text)[:3].mean((1, 2))
    with torch.enable_grad():
        image = row.image.detach().clone().double().requires_grad_()
        change = image - row.reference
        colour_change = change.mean((1, 2))
        length = (colour_change.square().sum() + 1e-4).sqrt()
        directional = 1 - (colour_change * functional.normalize(text_change, dim=0)).sum() / length
        content = change.square().mean()
        (gradient,) = torch.autograd.grad(directional + row.content_weight * content, image)
    return Scored(directional.item(), content.item(), gradient.float() if row.gradient else None)


def _mean(text: str) -> Tensor:
    seed = int.from_bytes(sha256(text.encode()).digest()[:6], "little")
    return standard_normal(SHAPE, seed=seed, purpose="toy") * (0.5 if text else 0.0)


class ToyBackend:
    """See the module.

    With ``invariant`` false, each noise prediction gets 1e-3 times the size of its pass added, so it depends on that
    size. This is known, and measured only where the survey is to be complete. With ``gradients`` false, the model does
    not offer to learn directions with gradients.
    """

    def __init__(
        self,
        model_id: str,
        settings: Settings,
        survey: Survey | None = None,
        *,
        invariant: bool = True,
        gradients: bool = True,
    ) -> None:
        self._invariant = invariant
        self._class = None if invariant else settings.exact_batch_class or 4
        digest = sha256(f"toy {invariant}".encode()).hexdigest()
        exactness, print_ = Exactness.ANY_SIZE if invariant else Exactness.FIXED_SIZE, f"toy-{self._class}"
        self.verdict: Verdict | None = None
        if survey is not None and survey.complete:
            network = Network(self._noise_preds, SHAPE, SHAPE, 1, settings.max_batch_size)
            key = Key(__version__, "toy", "1", digest, "float64", "", 0, 1, settings.max_batch_size)
            self.verdict = establish(network, key, settings, lambda _: None, survey)
            exactness, self._class = self.verdict.exactness, self.verdict.native_class
        info = ModelInfo(
            id=model_id,
            digest=digest,
            dtype="float64",
            methods=methods_for(reads_text=True),
            width=SHAPE[2] * SCALE,
            height=SHAPE[1] * SCALE,
            size_multiple=2 * SCALE,
            default_steps=min(20, settings.max_steps),
            prompt_tokens=16,
            batch_class=self._class,
            content_features="vae",
            gradients=gradients,
            fingerprint=print_,
            feature_sites=("mid", "up_0"),
            other_batch_class=self._class,
            backend="toy",
            exactness=exactness,
        )
        schedule = Schedule(ALPHAS, steps_offset=1)
        self.facts = Facts(info, schedule, SHAPE[0], SCALE, torch.device("cpu"), About("toy"))
        self.memory_rows: int | None = None
        """Largest size of a pass before :class:`OutOfMemory`; None for no limit. Tests set it."""

    def predict(self, batch: Batch) -> Sequence[Any]:
        """See :class:`Backend`."""
        if self.memory_rows is not None and batch.size > self.memory_rows:
            raise OutOfMemory(f"a pass of {batch.size} rows does not fit in the device's memory")
        return [self._answer(row, batch.size) for row in padded(batch.rows, batch.size)[: len(batch.rows)]]

    def unfinished(self) -> None:
        """See :class:`Backend`."""

    def batch_class(self, kind: type[Row], shape: tuple[int, ...]) -> int | None:
        """See :class:`Backend`."""
        if self._class is None or not is_network_row(kind):
            return None
        return self.facts.info.batch_class_at(shape[2] * SCALE, shape[1] * SCALE) if kind is Denoise else 2

    def minimum(self, kind: type[Row]) -> int:
        """See :class:`Backend`."""
        return 1

    def memory_bytes(self) -> dict[str, int]:
        """See :class:`Backend`."""
        return {}

    def _noise_preds(self, latents: Tensor, timesteps: list[int], embeds: Tensor) -> Tensor:
        rows = zip(latents, timesteps, embeds, strict=True)
        return torch.stack([self._answer(Denoise(x.double(), t, ALPHAS[t], mean), len(latents)) for x, t, mean in rows])

    def _answer(self, row: Row, size: int) -> Any:
        match row:
            case Denoise(latents=x, alpha_bar=abar, prompt_embeds=mean):
                residual, features = _through_sites(row, _residual(x, abar, mean))
                noise_pred = _pull(abar) * residual + (0.0 if self._invariant else 1e-3 * size)
                return Captured(noise_pred, features) if row.capture else noise_pred
            case PullBack(latents=x, alpha_bar=abar, prompt_embeds=mean, cotangent=cotangent):
                with torch.enable_grad():
                    x, mean = (tensor.detach().clone().requires_grad_() for tensor in (x, mean))
                    noise_pred = _pull(abar) * _residual(x, abar, mean)
                    return Pulled(*torch.autograd.grad(noise_pred, (x, mean), cotangent))
            case PullBackDecode(latents=z, cotangent=cotangent):
                small = functional.avg_pool2d(cotangent[None].double(), SCALE)[0] * SCALE**2
                return torch.cat([small * (z[:3].abs() <= 1), torch.zeros_like(z[3:])])
            case Score():
                return _score(row)
            case Encode(image=image):
                small = functional.avg_pool2d(image[None].double(), SCALE)[0]
                return torch.cat([small, small.mean(0, keepdim=True)])
            case Decode(latents=z):
                return functional.interpolate(z[None, :3].float(), scale_factor=SCALE)[0].clamp(-1, 1)
            case Embed(text=text):
                words = text.split()
                return Embedded(_mean(text), " ".join(words[self.facts.info.prompt_tokens :]))


def _through_sites(row: Denoise, residual: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The residual after the row's maps, and the activations that it captures, by feature site."""
    features = {}
    for site, scale in (("mid", 2), ("up_0", 1)):
        activation = functional.avg_pool2d(residual[None], scale)[0].float()
        if site in row.capture:
            features[site] = activation
        if site in row.maps:
            change = (row.maps[site](activation) - activation).double()
            residual = residual + functional.interpolate(change[None], scale_factor=scale)[0]
    return residual, features
