"""Rows computed by torch in eager mode, on the CPU or one CUDA device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from underpaint_server.backends.invariance import fingerprint, is_batch_invariant
from underpaint_server.backends.protocol import DeviceLost, padded
from underpaint_server.errors import ModelNotReady, OutOfMemory
from underpaint_server.jobs import ModelInfo
from underpaint_server.models import checkpoint, families
from underpaint_server.models.clip import Clip
from underpaint_server.models.edit_loss import EditLoss, vae_features, vgg_features
from underpaint_server.models.facts import Facts
from underpaint_server.models.families import Family
from underpaint_server.models.libraries import reading
from underpaint_server.models.stable_diffusion import StableDiffusion
from underpaint_server.models.taps import Taps
from underpaint_server.rows import Batch, Decode, Denoise, Embed, Encode, PullBack, PullBackDecode, Row, Score
from underpaint_server.settings import Device, ExactBatching, Settings, usable_cores

DEFAULT_STEPS = 50
SIDE_STAGES: dict[type[Row], int] = {Encode: 2, Decode: 2, Embed: 4, PullBackDecode: 2, Score: 2}
"""Rows of every pass of the autoencoder and the text encoder: fixed, so that their answers have the same bits for
every job at every load. They are a few in a hundred of a job's work; padding them costs less than measuring."""
DIFFERENTIATED = (PullBack, PullBackDecode, Score)
"""Rows whose answers need gradients."""
CPU_MEASURED_PARAMETERS = 200_000_000
"""A larger network would keep a CPU busy for minutes with being measured: it is pinned instead."""
MINIMUM = 2
"""Torch takes other kernels for a single image than for several; no pass is smaller than this."""


class TorchBackend:
    """One checkpoint on one device."""

    def __init__(self, model: Family, model_id: str, settings: Settings, edit_loss: EditLoss | None = None) -> None:
        self._model = model
        self._edit_loss = edit_loss
        self._settings = settings
        _tile_conditioning(model.unet)
        self._taps = Taps(model.unet)
        width, height = model.native_px
        channels = model.latent_channels
        self._native = (channels, height // model.vae_scale, width // model.vae_scale)
        self._embeds = model.embeds_shape
        self._invariant = self._may_measure() and self._is_invariant()
        info = ModelInfo(
            id=model_id,
            digest=model.digest,
            dtype=str(model.unet.dtype).removeprefix("torch."),
            methods=model.methods,
            width=width,
            height=height,
            size_multiple=model.size_multiple,
            default_steps=DEFAULT_STEPS,
            prompt_tokens=model.prompt_tokens,
            batch_class=self.batch_class(Denoise, self._native),
            content_features=edit_loss.name if edit_loss is not None else "",
            gradients=edit_loss is not None,
            fingerprint=self._fingerprint(),
            feature_sites=self._taps.sites,
        )
        self.facts = Facts(info, model.schedule, channels, model.vae_scale, model.unet.device, model.about)

    @property
    def network(self) -> nn.Module:
        """The denoising network itself, for measurements beside the engine."""
        unet: nn.Module = self._model.unet
        return unet

    @classmethod
    def load(cls, place: str, model_id: str, settings: Settings) -> "TorchBackend":
        """Read a checkpoint and make it ready; raises :class:`ModelNotReady`."""
        device = _prepare(settings)
        directory = checkpoint.resolve(place, settings.allow_network)
        with reading():
            model = families.load(directory, dtype=getattr(torch, settings.dtype.value), device=device)
            edit_loss = _edit_loss(model, directory, model_id, settings)
        return cls(model, model_id, settings, edit_loss)

    def predict(self, batch: Batch) -> Sequence[Any]:
        """See :class:`Backend`."""
        rows = padded(batch.rows, batch.size)
        try:
            with torch.enable_grad() if isinstance(rows[0], DIFFERENTIATED) else torch.inference_mode():
                return self._answers(rows)[: len(batch.rows)]
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemory(f"{len(rows)} rows do not fit the device") from error
        except torch.AcceleratorError as error:
            raise DeviceLost(str(error)) from error

    def batch_class(self, kind: type[Row], shape: tuple[int, ...]) -> int | None:
        """See :class:`Backend`. Only the model's own shape is measured, at start; exact jobs of others are pinned."""
        if kind not in (Denoise, PullBack):
            return SIDE_STAGES[kind]
        return None if self._invariant and shape == self._native else self._settings.exact_batch_class

    def minimum(self, kind: type[Row]) -> int:
        """See :class:`Backend`."""
        return SIDE_STAGES.get(kind, MINIMUM)

    def memory_bytes(self) -> dict[str, int]:
        """See :class:`Backend`."""
        device = self.facts.device
        if device.type != "cuda":
            return {}
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": torch.cuda.max_memory_allocated(device),
            "total": torch.cuda.get_device_properties(device).total_memory,
        }

    def _answers(self, rows: list[Any]) -> Sequence[Any]:
        match rows[0]:
            case Denoise():
                return self._taps.answers(self._model.noise_preds, rows)
            case PullBack():
                return self._differentiable.pull_back(rows)
            case PullBackDecode():
                latents, cotangents = zip(*((row.latents, row.cotangent) for row in rows), strict=True)
                return self._differentiable.pull_back_decode(torch.stack(latents), torch.stack(cotangents)).unbind()
            case Score():
                assert self._edit_loss is not None
                return self._edit_loss.scores(rows)
            case Encode():
                return self._model.encode(torch.stack([row.image for row in rows])).unbind()
            case Decode():
                return self._model.decode(torch.stack([row.latents for row in rows])).unbind()
            case _:
                return self._model.embed([row.text for row in rows])

    @property
    def _differentiable(self) -> StableDiffusion:
        assert isinstance(self._model, StableDiffusion), "only a model with an edit loss is asked for gradients"
        return self._model

    def _may_measure(self) -> bool:
        """Never by the clock: another outcome at the next start would change the bits of answers."""
        heavy = self._model.unet.device.type == "cpu" and self._model.unet.num_parameters() > CPU_MEASURED_PARAMETERS
        return self._settings.exact_batching is ExactBatching.AUTO and not heavy

    def _is_invariant(self) -> bool:
        try:
            return is_batch_invariant(
                self._noise_preds, self._native, self._embeds, minimum=MINIMUM, maximum=self._settings.max_batch_size
            )
        except torch.OutOfMemoryError:  # the largest pass does not fit: the class, which is smaller, may
            torch.cuda.empty_cache()
            return False

    def _fingerprint(self) -> str:
        size = MINIMUM if self._invariant else self._settings.exact_batch_class
        return fingerprint(self._noise_preds, self._native, self._embeds, size=size)

    @torch.inference_mode()
    def _noise_preds(self, latents: Tensor, timesteps: list[int], embeds: Tensor) -> Tensor:
        device = self._model.unet.device
        rows = zip(latents.double().to(device), timesteps, embeds.to(device), strict=True)
        return self._model.noise_preds([Denoise(x, t, 0.5, e) for x, t, e in rows])


class TiledLinear(nn.Module):
    """A linear layer whose two-dimensional inputs are multiplied in tiles of a fixed number of rows.

    The layers that embed timesteps see one row an image, so their matrices are as tall as the batch, and the library
    picks its blocking by that height. With the height fixed, so is the order of additions.
    """

    TILE = 16

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """(b, in) or (b, tokens, in) to the same with out."""
        if x.dim() != 2:
            return functional.linear(x, self.linear.weight, self.linear.bias)
        filled = functional.pad(x, (0, 0, 0, -len(x) % self.TILE))
        tiles = [self.linear(filled[i : i + self.TILE]) for i in range(0, len(filled), self.TILE)]
        return torch.cat(tiles)[: len(x)]


def _tile_conditioning(unet: nn.Module) -> None:
    for module in list(unet.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name in {"linear_1", "linear_2", "time_emb_proj"}:
                setattr(module, name, TiledLinear(child))


def _edit_loss(model: Family, directory: Path, model_id: str, settings: Settings) -> EditLoss | None:
    """What directions are learned by; None where the checkpoint has no CLIP beside it."""
    clip = checkpoint.clip(directory, settings.clip_places.get(model_id, ""))
    if clip is None or not isinstance(model, StableDiffusion):
        return None
    device = model.vae.device
    name, features = (
        ("vgg16", vgg_features(Path(settings.vgg), device)) if settings.vgg else ("vae", vae_features(model.vae))
    )
    return EditLoss(name, Clip.load(clip, device=device), features)


def _prepare(settings: Settings) -> torch.device:
    if settings.device is Device.CUDA and not torch.cuda.is_available():
        raise ModelNotReady("device is cuda, but torch sees none here; use --device cpu")
    torch.set_num_threads(settings.threads or usable_cores())
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    use_cuda = settings.device is Device.CUDA or (settings.device is Device.AUTO and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")
