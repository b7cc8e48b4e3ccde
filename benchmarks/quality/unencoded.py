"""DiffEdit without its encoding, an ablation that the service does not offer: it starts from noise, as SDEdit does.

Runs the service's DiffEdit in this process, on a trajectory of the source with one noise added at every level instead
of the trajectory of DDIM inversion.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from underpaint_server.backends.protocol import Backend
from underpaint_server.diffusion.ddim import add_noise
from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.diffusion.sampling import Guidance
from underpaint_server.methods.cost import used_steps
from underpaint_server.methods.diffedit import steps as diffedit
from underpaint_server.methods.diffedit.options import DiffEdit
from underpaint_server.methods.task import Editing
from underpaint_server.models import tensors
from underpaint_server.models.facts import Facts
from underpaint_server.rows import Batch, Decode, Embed, Encode, Row, Steps

from benchmarks.cases import Case

PASS = 16
"""Most rows of one forward pass."""


def edit(
    facts: Facts, case: Case, mask: NDArray[np.bool_], *, steps: int, strength: float, guidance_scale: float, seed: int
) -> Steps[NDArray[np.uint8]]:
    """The generator of one edit, which returns an image (height, width, 3); ``mask`` is True where it may change."""
    size = (facts.info.width, facts.info.height)
    photo = np.array(Image.fromarray(case.source).resize(size, Image.Resampling.LANCZOS))
    white = np.asarray(Image.fromarray(np.uint8(255) * mask).resize(size, Image.Resampling.NEAREST))
    towards, away = yield [Embed(case.target_prompt), Embed("")]
    (source,) = yield [Encode(tensors.image(photo).to(facts.device))]
    grid = facts.schedule.grid(steps, used_steps(steps, strength))
    noise = standard_normal(tuple(source.shape), seed=seed, purpose="unencoded").to(facts.device)
    trajectory = torch.stack([source, *(add_noise(source, noise, level) for level in grid[1:])])
    task: Editing[DiffEdit, Tensor | diffedit.Masking] = Editing(
        arrays={"source": source, "trajectory": trajectory},
        grid=grid,
        guidance=Guidance(towards.prompt_embeds, away.prompt_embeds, guidance_scale),
        noise=lambda _purpose, _index: noise,
        inversion=None,
        options=DiffEdit(None, 0.5, 1, 0.5, ""),
        extra=tensors.latent_mask(white, source, facts),
    )
    outcome = yield from diffedit.edit(task)
    (image,) = yield [Decode(outcome.latents)]
    return tensors.picture(image)


def run(backend: Backend, edits: Sequence[Steps[NDArray[np.uint8]]]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Run all generators at the same time; yields (index in ``edits``, image) of each when it ends."""
    waiting = {index: next(generator) for index, generator in enumerate(edits)}
    while waiting:
        answers = _answers(backend, [row for group in waiting.values() for row in group])
        for index, group in list(waiting.items()):
            try:
                waiting[index] = edits[index].send([answers[id(row)] for row in group])
            except StopIteration as end:
                del waiting[index]
                yield index, end.value


def _answers(backend: Backend, rows: Sequence[Row]) -> dict[int, Any]:
    """``id`` of each row -> its answer; every pass has rows of one kind."""
    answers: dict[int, Any] = {}
    for kind, members in groupby(sorted(rows, key=lambda row: type(row).__name__), key=type):
        same_kind = list(members)
        for i in range(0, len(same_kind), PASS):
            part = same_kind[i : i + PASS]
            size = max(len(part), backend.minimum(kind))
            answers |= zip(map(id, part), backend.predict(Batch(part, size)), strict=True)
    return answers
