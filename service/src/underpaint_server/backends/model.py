"""The backend of every checkpoint: turns rows into calls of its networks, which a runtime computes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from underpaint_server.backends.cuda import CudaPass
from underpaint_server.backends.exactness import Survey, establish, key_of
from underpaint_server.backends.invariance import Network
from underpaint_server.backends.protocol import DeviceLost, Unfinished, padded
from underpaint_server.backends.runtime import Runtime
from underpaint_server.backends.trial import try_once
from underpaint_server.cores import usable_cores
from underpaint_server.errors import ModelNotReady, OutOfMemory
from underpaint_server.jobs import ModelInfo
from underpaint_server.methods import methods_for
from underpaint_server.models import checkpoint, families, tensors
from underpaint_server.models.clip import Clip
from underpaint_server.models.edit_loss import EditLoss, vae_features, vgg_features
from underpaint_server.models.facts import Facts
from underpaint_server.models.families import Family
from underpaint_server.models.stable_diffusion import StableDiffusion
from underpaint_server.rows import (
    Batch,
    Decode,
    Denoise,
    Encode,
    PullBack,
    PullBackDecode,
    Row,
    Score,
)
from underpaint_server.settings import Settings

log = structlog.get_logger(__name__)

DEFAULT_STEPS = 50
"""Default of ``steps`` in requests."""
DIFFERENTIATED = (PullBack, PullBackDecode, Score)
"""Kinds of row that torch computes in grad mode, whatever the runtime."""
LARGE_WORK = 200e9
"""Product of the parameters of a network and the area of its native latents beyond which it is large for a CPU."""
MINIMUM = 2
"""Smallest size of a pass that torch computes: it chooses other kernels for one image than for several."""


MakeRuntime = Callable[[Family, Settings], Runtime]
"""Makes the runtime of a model; raises :class:`Unavailable` if it cannot compute it."""


class ModelBackend:
    """One checkpoint on one device; see :class:`Backend`.

    ``edit_loss`` is the loss of learned directions; None if the model cannot learn any. ``survey`` says how it is
    measured. Raises :class:`ModelNotReady` if the model cannot compute one edit, and what ``make_runtime`` raises.
    """

    def __init__(
        self,
        model: Family,
        model_id: str,
        settings: Settings,
        make_runtime: MakeRuntime,
        edit_loss: EditLoss | None = None,
        survey: Survey | None = None,
    ) -> None:
        self._model = model
        self._edit_loss = edit_loss
        note = partial(log_loading, model_id)
        try_once(model, settings, note)
        self._runtime = make_runtime(model, settings)
        width, height = model.native_px
        channels = model.latent_channels
        network = Network(
            self._noise_preds,
            (channels, height // model.vae_scale, width // model.vae_scale),
            model.embeds_shape,
            self._runtime.passes(Denoise).minimum,
            settings.max_batch_size,
            self._runtime.isolate_rows,
        )
        key = key_of(self._runtime, model.digest, model.unet.device, settings, network)
        verdict = self.verdict = establish(network, key, settings, note, survey)
        info = ModelInfo(
            id=model_id,
            digest=model.digest,
            dtype=self._runtime.dtype,
            methods=methods_for(reads_text=model.prompt_tokens > 0),
            width=width,
            height=height,
            size_multiple=model.size_multiple,
            default_steps=min(DEFAULT_STEPS, model.schedule.max_steps, settings.max_steps),
            max_steps=model.schedule.max_steps,
            prompt_tokens=model.prompt_tokens,
            batch_class=verdict.native_class,
            content_features=edit_loss.name if edit_loss is not None else "",
            gradients=edit_loss is not None,
            fingerprint=verdict.measured.fingerprint,
            feature_sites=self._runtime.sites,
            other_batch_class=verdict.other_class,
            backend=self._runtime.name,
            exactness=verdict.exactness,
        )
        self.facts = Facts(info, model.schedule, channels, model.vae_scale, model.unet.device, model.about)
        self._begin_pass = partial(CudaPass, model.unet.device) if model.unet.device.type == "cuda" else None
        self._unfinished: CudaPass | None = None
        self._runtime.prepare(self._run_pass, self._sizes(settings.max_batch_size))

    @property
    def network(self) -> nn.Module:
        """The denoising network, for benchmarks that bypass the engine."""
        unet: nn.Module = self._model.unet
        return unet

    def predict(self, batch: Batch) -> Sequence[Any]:
        """See :class:`Backend`."""
        rows = padded(batch.rows, batch.size)
        is_differentiated = isinstance(rows[0], DIFFERENTIATED)
        try:
            with self._timed(), torch.enable_grad() if is_differentiated else torch.inference_mode():
                return self._answers(rows)[: len(batch.rows)]
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            message = f"a pass of {len(rows)} rows does not fit in the device's memory; use a smaller image"
            raise OutOfMemory(message) from error
        except torch.AcceleratorError as error:
            raise DeviceLost(str(error)) from error

    def unfinished(self) -> Unfinished | None:
        """See :class:`Backend`."""
        return self._unfinished

    def batch_class(self, kind: type[Row], shape: tuple[int, ...]) -> int | None:
        """See :class:`Backend`. Only the native shape is measured, at start; others are pinned, unless the runtime
        computes each of their rows by itself.

        What torch differentiates has the smallest class, because it needs several times the memory.
        """
        if kind in DIFFERENTIATED:
            is_free = kind is PullBack and self._runtime.name == "torch" and self._class_at(shape) is None
            return None if is_free else MINIMUM
        return self._class_at(shape) if kind is Denoise else self._runtime.passes(kind).batch_class

    def minimum(self, kind: type[Row]) -> int:
        """See :class:`Backend`."""
        return MINIMUM if kind in DIFFERENTIATED else self._runtime.passes(kind).minimum

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

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """What is queued in the block is one pass. On the CPU it has ended with the block."""
        self._unfinished = None
        begun = self._begin_pass() if self._begin_pass is not None else None
        yield
        if begun is not None:
            begun.queued()
            self._unfinished = begun

    def _answers(self, rows: list[Any]) -> Sequence[Any]:
        match rows[0]:
            case Denoise():
                return self._runtime.answers(self._model.noise_preds, rows)
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
        assert isinstance(self._model, StableDiffusion), "only Stable Diffusion has an edit loss"
        return self._model

    def _class_at(self, shape: tuple[int, ...]) -> int | None:
        scale = self.facts.vae_scale
        return self.facts.info.batch_class_at(shape[2] * scale, shape[1] * scale)

    def _sizes(self, maximum: int) -> Sequence[int]:
        """The sizes of passes of Denoise rows at the native size."""
        native_class = self.verdict.native_class
        return [native_class] if native_class else range(self._runtime.passes(Denoise).minimum, maximum + 1)

    def _run_pass(self, size: int) -> None:
        """A pass of so many rows of random numbers, if the device has the memory for it."""
        generator = torch.Generator().manual_seed(2)
        shapes = (self.facts.latent_shape(*self._model.native_px), self._model.embeds_shape)
        latents, embeds = (torch.randn((size, *shape), generator=generator) for shape in shapes)
        try:
            self._noise_preds(latents, [len(self._model.schedule.alphas_cumprod) // 2] * size, embeds)
        except torch.OutOfMemoryError:  # the engine will halve such passes when they come
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _noise_preds(self, latents: Tensor, timesteps: list[int], embeds: Tensor) -> Tensor:
        device = self._model.unet.device
        rows = zip(latents.double().to(device), timesteps, embeds.to(device), strict=True)
        noise_preds = self._model.noise_preds([Denoise(x, t, 0.5, e) for x, t, e in rows])
        if not bool(noise_preds.isfinite().all()):
            advice = tensors.overflow_advice(self._runtime.dtype)
            raise ModelNotReady(f"the network returns NaN or infinite numbers at its native size{advice}")
        return noise_preds


def is_heavy(model: Family) -> bool:
    """Whether a row of the network is much work for a CPU; False on a GPU."""
    width, height = model.native_px
    parameters: int = sum(weights.numel() for weights in model.unet.parameters())
    work = parameters * height * width / model.vae_scale**2
    return model.unet.device.type == "cpu" and work > LARGE_WORK


def edit_loss(model: Family, directory: Path, model_id: str, settings: Settings) -> EditLoss | None:
    """The loss of learned directions; None if the checkpoint has no CLIP or is not Stable Diffusion."""
    named = settings.clip_directories.get(model_id, "")
    if not isinstance(model, StableDiffusion):
        if named:
            raise ModelNotReady(
                f"clips: '{model_id}' has a CLIP, but a {model.about.family} model cannot learn directions: remove"
                f" {model_id}={named}"
            )
        return None
    clip = checkpoint.clip(directory, named)
    if clip is None:
        return None
    device = model.vae.device
    name, features = (
        ("vgg16", vgg_features(Path(settings.vgg), device)) if settings.vgg else ("vae", vae_features(model.vae))
    )
    return EditLoss(name, Clip.load(clip, device=device), features)


def log_loading(model_id: str, note: str) -> None:
    """Log what is being done while a model is loaded."""
    log.info("loading a model", model=model_id, note=note)


def load_model(
    location: str,
    model_id: str,
    settings: Settings,
    survey: Survey | None,
    dtype: torch.dtype,
    make_runtime: MakeRuntime,
) -> ModelBackend:
    """Load the checkpoint at a location, see :func:`checkpoint.resolve`, with the U-Net's weights in ``dtype``.

    What is being done is logged, and the remarks of :class:`About`. Raises :class:`ModelNotReady`,
    :class:`DeviceLost` and :class:`Unavailable`.
    """
    device = device_of(settings)
    _configure_torch(settings)
    directory = checkpoint.resolve(location, settings.allow_network)
    log_loading(model_id, "reading the weights")
    try:
        model = families.load(directory, dtype=dtype, device=device)
        for remark in model.about.remarks:
            log_loading(model_id, remark)
        loss = edit_loss(model, directory, model_id, settings)
        return ModelBackend(model, model_id, settings, make_runtime, loss, survey)
    except torch.OutOfMemoryError as error:
        raise ModelNotReady("it does not fit in the device's memory; use a --dtype of half precision") from error
    except torch.AcceleratorError as error:
        raise DeviceLost(str(error)) from error


def device_of(settings: Settings) -> torch.device:
    """The device that the settings name; raises :class:`ModelNotReady` if there is none."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ModelNotReady("device: torch finds no CUDA device; use --device cpu, or check the driver")
    use_cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def _configure_torch(settings: Settings) -> None:
    torch.set_num_threads(settings.threads or usable_cores())
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # An algorithm that is chosen by timing may be another one after a restart, with other bits: the fingerprint would
    # change, and stored inversions be useless. cuDNN's own choice depends on device, version and shapes alone.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
