"""Jobs and pictures that several suites ask for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from underpaint_server.jobs import (
    Companion,
    Descent,
    EditJob,
    EditOptions,
    Generated,
    Interpolation,
    Inversion,
    InversionOptions,
    InvertJob,
    Job,
    LearnJob,
    LearnOptions,
    LearnState,
    MaskJob,
    Photo,
    Picture,
    Sampler,
    Search,
    Source,
    Stored,
)
from underpaint_server.methods import METHODS
from underpaint_server.methods.content_injection.options import ContentInjection
from underpaint_server.methods.ddim.options import DdimEdit, DdimInversion
from underpaint_server.methods.diffedit.options import DiffEdit
from underpaint_server.methods.disentangled.options import DisentangledEdit
from underpaint_server.methods.edict.options import EdictEdit, EdictInversion
from underpaint_server.methods.sdedit.options import SdEdit


def disc(size: int, colour: tuple[int, int, int] = (220, 40, 40), share: float = 0.33) -> Picture:
    """A disc on light grey, (size, size, 3)."""
    y, x = np.mgrid[:size, :size]
    inside = (x - size / 2) ** 2 + (y - size / 2) ** 2 < (size * share) ** 2
    return np.where(inside[..., None], np.array(colour), 235).astype(np.uint8)


def read_picture(path: Path) -> Image.Image:
    """A picture file, read whole and closed."""
    with Image.open(path) as image:
        image.load()
    return image


def edict_options(steps: int = 20, strength: float = 0.8, guidance_scale: float = 3.0) -> InversionOptions:
    return InversionOptions(EdictInversion(), steps, strength, guidance_scale, "a red circle")


def ddim_options(steps: int = 20, strength: float = 0.8, guidance_scale: float = 1.0) -> InversionOptions:
    return InversionOptions(DdimInversion(), steps, strength, guidance_scale, "")


def diffedit(mask: Picture | None = None, samples: int = 5) -> DiffEdit:
    return DiffEdit(mask, 0.5, samples, 0.5, "a red circle")


def content_options(steps: int = 20, sites: tuple[str, ...] = ("mid",), strength: float = 1.0) -> InversionOptions:
    return InversionOptions(DdimInversion(features=sites), steps, strength, 1.0, "")


def injection(**more: object) -> ContentInjection:
    """At half weight."""
    fields: dict[str, Any] = {
        "weight": 0.5,
        "calibration": 0.0,
        "region": None,
        "injection_end": 0.4,
        "every": 1,
        "boosting_start": 0.0,
        "interpolation": Interpolation.SLERP,
        "sites": ("mid",),
    }
    return ContentInjection(**(fields | more))


def injection_job(
    model: str,
    size: int,
    method: ContentInjection,
    source: Source | None = None,
    steps: int = 20,
    guidance_scale: float = 1.0,
) -> EditJob:
    """A small blue disc's content into the disc (or another source), by the faithful port: no text, no guidance."""
    content = Companion(Photo(disc(size, (30, 30, 200), 0.2)), content_options(steps, method.sites))
    source = source or Photo(disc(size))
    return EditJob(model, source, ddim_options(steps, 1.0), method, "", "", guidance_scale, 3, content)


def invert_job(model: str, size: int, options: InversionOptions | None = None, verify: bool = True) -> InvertJob:
    return InvertJob(model, Photo(disc(size)), options or edict_options(), verify)


def edit_job(
    model: str, size: int, method: EditOptions, source: Source | None = None, steps: int = 20, seed: int = 3
) -> EditJob:
    """An edit of the disc to green with that method's usual inversion."""
    options = {EdictEdit: edict_options(steps), DdimEdit: ddim_options(steps), DiffEdit: ddim_options(steps)}
    source = source or Photo(disc(size))
    inversion = options.get(type(method))
    if inversion is not None and isinstance(source, Generated) and METHODS[method.name].starts_from_noise:
        inversion = replace(inversion, strength=1.0)  # the noise of a generated source is the noisiest level
    return EditJob(model, source, inversion, method, "a green circle", "", 3.0, seed)


def disentangled(steps: int = 20, switch: int = 8, sampler: Sampler = Sampler.DDIM) -> DisentangledEdit:
    return DisentangledEdit("a red circle", (1.0,) * switch + (0.0,) * (steps - switch), sampler)


def learn_job(
    model: str,
    size: int,
    steps: int = 20,
    *,
    method: Descent | Search = Descent(3, 0.05),  # noqa: B008 (frozen)
    sampler: Sampler = Sampler.DDIM,
    photo: bool = False,
    state: LearnState | None = None,
    iterations: int = 10,
) -> LearnJob:
    """Learn to turn a red circle green, on a drawn picture or on the disc."""
    options = LearnOptions("a red circle", "a green circle", "", steps, sampler, 3.0, steps // 2, 0.0, 0.1, method, 5)
    example = Photo(disc(size)) if photo else Generated("a red circle", 5, size, size, steps)
    return LearnJob(model, options, (example,), state, iterations)


def every_kind_of_job(
    model: str, size: int, steps: int = 20, inversions: dict[str, Inversion] | None = None
) -> list[Job]:
    """One of each thing a server can be asked for; those from stored inversions too, where they are given."""
    drawn = Generated("a red apple", 5, size, size, steps)
    mask = disc(size, (255, 255, 255))[..., 0] // 255 * 255
    jobs: list[Job] = [
        invert_job(model, size, edict_options(steps)),
        invert_job(model, size, edict_options(steps, 0.7), verify=False),
        invert_job(model, size, ddim_options(steps, guidance_scale=3.0)),
        *(edit_job(model, size, m, steps=steps) for m in (SdEdit(0.7, steps), DdimEdit(), EdictEdit(), diffedit())),
        edit_job(model, size, diffedit(mask), steps=steps),
        *(edit_job(model, size, m, drawn, steps) for m in (SdEdit(0.5, steps), DdimEdit(), EdictEdit(), diffedit())),
        edit_job(model, size, disentangled(steps), steps=steps),
        edit_job(model, size, disentangled(steps, sampler=Sampler.PLMS), steps=steps),
        edit_job(model, size, disentangled(steps), drawn, steps),
        learn_job(model, size, steps),
        learn_job(model, size, steps, iterations=2),
        learn_job(model, size, steps, photo=True, sampler=Sampler.PLMS),
        learn_job(model, size, steps, method=Search((5, 10), (0.0, -0.1))),
        MaskJob(model, Photo(disc(size)), ddim_options(steps), diffedit(), "a green circle", "", 5.0, 3),
        MaskJob(model, drawn, ddim_options(steps), diffedit(), "a green circle", "", 5.0, 3),
    ]
    region = disc(size, (255, 255, 255))[..., 0] // 255 * 255
    jobs += [
        injection_job(model, size, injection(), steps=steps),
        injection_job(model, size, injection(calibration=0.3, every=3), steps=steps, guidance_scale=2.0),
        injection_job(model, size, injection(region=region, boosting_start=0.3), drawn, steps),
    ]
    for name, inversion in (inversions or {}).items():
        method = EdictEdit() if name == "edict" else DdimEdit()
        jobs.append(EditJob(model, Stored(inversion), inversion.options, method, "a green circle", "", 3.0, 3))
    return jobs
