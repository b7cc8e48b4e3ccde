"""What there is to compare with: the device's ceiling, the networks alone, diffusers' pipelines, EDICT in float64."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from underpaint_server.backends.model import ModelBackend
from underpaint_server.backends.protocol import Backend
from underpaint_server.backends.recorded import Recorded, Recorder
from underpaint_server.models.taps import Taps
from underpaint_server.rows import Batch, Decode, Denoise, Embed, Encode

from benchmarks.gpu.clock import seconds, synchronize
from benchmarks.gpu.engine import GUIDANCE, STRENGTH
from benchmarks.gpu.networks import Network, Scale


def ceiling(scale: Scale, device: torch.device) -> dict[str, float]:
    """TFLOP/s of a large matrix product of random numbers, and GB/s of a copy, reading and writing counted."""
    n, dtype = scale.matrix, getattr(torch, scale.dtype)
    a, b = (torch.randn((n, n), device=device, dtype=dtype) for _ in range(2))
    product_s = seconds(partial(torch.mm, a, b), device, 0.5)
    source = torch.randn(scale.copied_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy_s = seconds(partial(target.copy_, source), device, 0.5)
    return {"tflop_per_s": 2 * n**3 / product_s / 1e12, "gb_per_s": 2 * scale.copied_bytes / copy_s / 1e9}


def rows_of(backend: Backend, count: int) -> list[Denoise]:
    """Random rows at the model's own size."""
    facts = backend.facts
    (text,) = backend.predict(Batch([Embed("a photo")], backend.batch_class(Embed, ()) or 1))
    shape = facts.latent_shape(facts.info.width, facts.info.height)
    latents = torch.randn((count, *shape), dtype=torch.float64).to(facts.device)
    return [Denoise(x, 1 + 37 * i % 900, 0.5, text.prompt_embeds) for i, x in enumerate(latents)]


def passes(scale: Scale, backend: ModelBackend, device: torch.device) -> dict[str, dict[int, list[float]]]:
    """Rows by second of passes of each size: of the network as diffusers calls it, with channels-last weights, and of
    our backend. The three alternate."""
    plain, last = Network.sd15(scale, device), Network.sd15(scale, device)
    last.unet.to(memory_format=torch.channels_last)
    found: dict[str, dict[int, list[float]]] = {name: {} for name in ("diffusers", "channels-last", "our backend")}
    for _ in range(scale.rounds):
        for rows in scale.rows:
            batch = Batch(rows_of(backend, rows), rows)
            calls: dict[str, Callable[[], object]] = {
                "diffusers": plain.call(rows),
                "channels-last": last.call(rows),
                "our backend": partial(backend.predict, batch),
            }
            for name, call in calls.items():
                found[name].setdefault(rows, []).append(rows / seconds(call, device, scale.round_s))
    return found


def sdxl(scale: Scale, device: torch.device, recorder: Recorder | None) -> tuple[float, dict[int, float]]:
    """GFLOP of a row of the second network, and its rows by second with channels-last weights, by size of a pass.

    With a ``recorder``, its passes are recorded and replayed.
    """
    network = Network.sdxl(scale, device)
    network.unet.to(memory_format=torch.channels_last)
    compute: Callable[..., Tensor] = network
    if recorder is not None:
        compute = recorded = Recorded(network, Taps(network.unet), recorder)
        with torch.inference_mode():
            recorded.prepare(lambda rows: recorded(*network.inputs(rows)), scale.sdxl_rows)
    found = {
        rows: rows / seconds(partial(compute, *network.inputs(rows)), device, scale.round_s) for rows in scale.sdxl_rows
    }
    return network.gflop(), found


def side_stages(backend: Backend, device: torch.device, least_s: float) -> dict[str, float]:
    """Seconds by image or text of what is no step: encode, decode, embed."""
    facts = backend.facts
    shape = facts.latent_shape(facts.info.width, facts.info.height)
    rows: dict[str, Any] = {
        "encode": Encode(torch.zeros((3, facts.info.height, facts.info.width), device=device)),
        "decode": Decode(torch.zeros(shape, device=device, dtype=torch.float64)),
        "embed": Embed("a photo of something"),
    }
    found = {}
    for name, row in rows.items():
        size = backend.batch_class(type(row), ()) or backend.minimum(type(row))
        batch = Batch([row] * size, size)
        found[name] = seconds(partial(backend.predict, batch), device, least_s) / size
    return found


def diffusers_edits(scale: Scale, directory: Path, device: torch.device) -> dict[str, list[float]]:
    """Edits by second of diffusers' image-to-image pipeline, all of it in the network's dtype: one by one, and a batch
    that has the same steps, strength and guidance throughout."""
    dtype = getattr(torch, scale.dtype)
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(directory, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    size = 8 * int(scale.vae["sample_size"]) // 8
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8))

    def edits(count: int) -> float:
        synchronize(device)
        began = perf_counter()
        pipeline(
            prompt=["a picture of something"] * count, image=[photo] * count, strength=STRENGTH,
            num_inference_steps=scale.steps, guidance_scale=GUIDANCE, output_type="np",
        )  # fmt: skip
        synchronize(device)
        return count / (perf_counter() - began)

    counts = {"one by one": 1, "static batch": scale.jobs // 2}
    found: dict[str, list[float]] = {name: [] for name in counts}
    for turn in range(scale.rounds):
        for name, count in counts.items():
            speed = edits(count)
            if turn > 0:  # the first is warm-up
                found[name].append(speed)
    return found


def official_edict_s(scale: Scale, device: torch.device, measured_steps: int = 3) -> float:
    """Seconds of an EDICT edit in float64 with one call of the network for each row, as the authors' code computes it.

    A few steps are measured, and extrapolated to inversion and generation.
    """
    network = Network.sd15(scale, device)
    unet: UNet2DConditionModel = network.unet.double()
    latents, timesteps, embeds = network.inputs(1)
    inputs: Sequence[Tensor] = (latents.double(), timesteps, embeds.double())

    def step() -> None:
        for _ in range(4):
            unet(*inputs, return_dict=False)

    with torch.inference_mode():
        step()
        times = []
        for _ in range(measured_steps):
            synchronize(device)
            began = perf_counter()
            step()
            synchronize(device)
            times.append(perf_counter() - began)
    return 2 * round(STRENGTH * scale.steps) * median(times)
