"""From a job to one generator: texts and image in, inversion, edit, image out.

The methods themselves are in ``algorithms``; here they are put in order. Latents are float64 on the model's device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite

from torch import Tensor

from underpaint_server import jobs
from underpaint_server.algorithms import EDITORS, INVERTERS, RECONSTRUCTORS, diffedit, disentangle
from underpaint_server.diffusion import masks
from underpaint_server.diffusion.ddim import told
from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.diffusion.sampling import Guidance, denoise, together
from underpaint_server.diffusion.schedule import Grid
from underpaint_server.diffusion.tasks import Content, Editing, Inverting, Learning, Masking, Mixing
from underpaint_server.engine import pictures
from underpaint_server.errors import NonFiniteLatents
from underpaint_server.jobs import (
    ContentInjection,
    DdimEdit,
    DdimInversion,
    Descent,
    DiffEdit,
    DisentangledEdit,
    EdictEdit,
    EdictInversion,
    Edited,
    EditJob,
    Generated,
    Inversion,
    InversionOptions,
    Inverted,
    InvertJob,
    Job,
    Learned,
    LearnJob,
    LearnOptions,
    Masked,
    MaskJob,
    Notice,
    Photo,
    Result,
    Sampler,
    SdEdit,
    Stored,
    Usage,
)
from underpaint_server.models.facts import Facts
from underpaint_server.plans import boosted_steps, injected_steps, used_steps
from underpaint_server.rows import Decode, Embed, Encode, Steps


def program(job: Job, model: Facts, batch_class: int | None) -> Steps[Result]:
    """The generator that answers ``job``; its result has an empty ``usage``, which is the engine's to fill."""
    match job:
        case InvertJob():
            return _invert(job, model, batch_class)
        case EditJob():
            return _edit(job, model, batch_class)
        case MaskJob():
            return _mask(job, model)
        case LearnJob():
            return _learn(job, model)


def is_exact(job: Job) -> bool:
    """Whether the job's promise needs equal rows to give equal bits: all of EDICT does."""
    if isinstance(job, InvertJob):
        return isinstance(job.options.method, EdictInversion)
    return isinstance(job, EditJob) and isinstance(job.method, EdictEdit)


# --- invert -----------------------------------------------------------------------------------------------------


def _invert(job: InvertJob, model: Facts, batch_class: int | None) -> Steps[Result]:
    texts = yield from _embed(source_prompt=job.options.source_prompt, empty="")
    guidance = Guidance(texts["source_prompt"], texts["empty"], job.options.guidance_scale)
    inversion = job.inversion
    if inversion is None:
        source = yield from _encode(job.source, model)
        inversion = yield from _run_inverter(job.model, job.options, source, guidance, model, batch_class)
    if job.verify:
        inversion = yield from _verified(inversion, job.source, guidance, model)
    return Inverted(inversion, Usage(), texts.notices)


def _run_inverter(
    model_id: str, options: InversionOptions, source: Tensor, guidance: Guidance, model: Facts, batch_class: int | None
) -> Steps[Inversion]:
    task = Inverting(source, _grid(options, model), guidance, options)
    arrays = yield from INVERTERS[type(options.method)](task)
    pictures.check_finite(*arrays.values())
    return Inversion(
        model=model_id,
        model_digest=model.info.digest,
        options=options,
        width=source.shape[2] * model.vae_scale,
        height=source.shape[1] * model.vae_scale,
        batch_class=batch_class,
        fingerprint=model.info.fingerprint,
        arrays={name: array.cpu().numpy() for name, array in arrays.items()},
    )


def _verified(inversion: Inversion, photo: Photo, guidance: Guidance, model: Facts) -> Steps[Inversion]:
    """The inversion with its round trip measured: latents against latents, pixels against pixels."""
    arrays = pictures.arrays(inversion, model)
    task = Editing(arrays, _grid(inversion.options, model), guidance, _mixing(inversion.options), _no_noise)
    outcome = yield from RECONSTRUCTORS[type(inversion.options.method)](task)
    pictures.check_finite(outcome.latents)
    (image,) = yield [Decode(outcome.latents)]
    return replace(
        inversion,
        reconstruction_max_abs_error=float((outcome.latents - arrays["source"]).abs().max()),
        reconstruction_psnr_db=pictures.psnr_db(pictures.picture(image), photo.pixels),
    )


# --- edit -------------------------------------------------------------------------------------------------------


def _edit(job: EditJob, model: Facts, batch_class: int | None) -> Steps[Result]:
    texts = yield from _embed(
        target_prompt=job.target_prompt,
        negative_prompt=job.negative_prompt,
        source_prompt=_source_prompt(job),
        reference_prompt=job.method.reference_prompt if isinstance(job.method, DiffEdit) else "",
        empty="",
    )
    content = content_made = None
    if job.content is not None:
        (arrays, made), (recorded, content_made) = yield from together(
            _arrays(job, texts, model, batch_class), _content_arrays(job.model, job.content, texts, model)
        )
        content = _content(job, job.content, recorded, arrays["source"], model)
    else:
        arrays, made = yield from _arrays(job, texts, model, batch_class)
    noise = _noise(job.seed, arrays["source"], model)
    mixing = (yield from _edit_mixing(job, arrays["source"], texts, noise, model)) if _mixes(job) else None
    mask = masking = None
    if isinstance(job.method, DiffEdit):
        if job.method.mask is not None:
            mask = pictures.latent_mask(job.method.mask, arrays["source"], model)
        masking = _masking(job, job.method, arrays["source"], texts, noise, model)
    task = Editing(
        arrays=arrays,
        grid=_edit_grid(job, model),
        guidance=Guidance(texts["target_prompt"], texts["negative_prompt"], job.guidance_scale),
        mixing_coefficient=_mixing(job.inversion),
        noise=noise,
        method=job.method,
        masking=masking,
        mask=mask,
        mixing=mixing,
        content=content,
    )
    outcome = yield from EDITORS[type(job.method)](task)
    pictures.check_finite(outcome.latents)
    (image,) = yield [Decode(outcome.latents)]
    mask_picture = None if outcome.mask is None else pictures.mask_picture(outcome.mask, model)
    notices = texts.notices + outcome.notices
    return Edited(pictures.picture(image), mask_picture, made, Usage(), notices, content_made)


def _arrays(
    job: EditJob, texts: "_Texts", model: Facts, batch_class: int | None
) -> Steps[tuple[dict[str, Tensor], Inversion | None]]:
    """What the edit starts from, and the inversion that was made on the way, if one was."""
    source = job.source
    match source:
        case Stored(inversion=inversion):
            return pictures.arrays(inversion, model), None
        case Generated() if isinstance(job.method, DdimEdit | EdictEdit | DisentangledEdit | ContentInjection):
            start = _start(source, model)  # the picture's own noise: nothing has to be inverted
            return {"source": start, "trajectory": start[None], "x": start, "y": start}, None
        case Generated():
            latents = yield from _draw(source, job.guidance_scale, texts, model)
        case Photo():
            latents = yield from _encode(source, model)
    if job.inversion is None:
        return {"source": latents}, None
    guidance = Guidance(texts["source_prompt"], texts["empty"], job.inversion.guidance_scale)
    made = yield from _run_inverter(job.model, job.inversion, latents, guidance, model, batch_class)
    return pictures.arrays(made, model), made if isinstance(source, Photo) else None


def _content_arrays(
    model_id: str, content: jobs.Content, texts: "_Texts", model: Facts
) -> Steps[tuple[dict[str, Tensor], Inversion | None]]:
    """The content's inversion, and that again if it was made here: without text, which would be the source's."""
    if isinstance(content.source, Stored):
        return pictures.arrays(content.source.inversion, model), None
    latents = yield from _encode(content.source, model)
    guidance = Guidance(texts["empty"], texts["empty"], content.inversion.guidance_scale)
    made = yield from _run_inverter(model_id, content.inversion, latents, guidance, model, None)
    return pictures.arrays(made, model), made


def _content(
    job: EditJob, content: jobs.Content, recorded: Mapping[str, Tensor], source: Tensor, model: Facts
) -> Content:
    method, way = job.method, content.inversion.method
    assert isinstance(method, ContentInjection)
    assert isinstance(way, DdimInversion)
    assert job.inversion is not None
    return Content(
        features={site: recorded[f"h_{site}"] for site in method.sites},
        timesteps=[level.timestep for level in told(_grid(content.inversion, model), way.convention)],
        region=None if method.region is None else pictures.latent_mask(method.region, source, model),
        injected=injected_steps(method, job.inversion),
        boosted=boosted_steps(method, job.inversion),
    )


def _edit_grid(job: EditJob, model: Facts) -> Grid:
    if isinstance(job.method, SdEdit):
        steps = job.method.num_inference_steps
        return model.schedule.grid(steps, used_steps(steps, job.method.strength))
    if isinstance(job.method, DisentangledEdit):
        return model.schedule.grid(len(job.method.weights))
    if isinstance(job.source, Generated) and not isinstance(job.method, DiffEdit):
        return model.schedule.grid(job.source.num_inference_steps)
    assert job.inversion is not None
    return _grid(job.inversion, model)


def _source_prompt(job: EditJob | MaskJob) -> str:
    if isinstance(job, EditJob) and isinstance(job.method, DisentangledEdit):
        return job.method.source_prompt
    if isinstance(job.source, Generated):
        return job.source.prompt
    return job.inversion.source_prompt if job.inversion is not None else ""


# --- mask -------------------------------------------------------------------------------------------------------


def _mask(job: MaskJob, model: Facts) -> Steps[Result]:
    texts = yield from _embed(
        target_prompt=job.target_prompt,
        reference_prompt=job.method.reference_prompt,
        source_prompt=_source_prompt(job),
        empty="",
    )
    match job.source:
        case Stored(inversion=inversion):
            source = pictures.arrays(inversion, model)["source"]
        case Generated() as generated:
            source = yield from _draw(generated, job.guidance_scale, texts, model)
        case Photo() as photo:
            source = yield from _encode(photo, model)
    noise = _noise(job.seed, source, model)
    difference = yield from diffedit.difference(_masking(job, job.method, source, texts, noise, model))
    mask = masks.binarise(difference, job.method.threshold)
    return Masked(
        mask=pictures.mask_picture(mask, model),
        difference=difference.float().cpu().numpy(),
        coverage=float(mask.mean()),
        usage=Usage(),
        notices=texts.notices + diffedit.notices(mask),
    )


def _masking(
    job: EditJob | MaskJob,
    method: DiffEdit,
    source: Tensor,
    texts: "_Texts",
    noise: Callable[[str, int], Tensor],
    model: Facts,
) -> Masking:
    assert job.inversion is not None
    steps = job.inversion.num_inference_steps
    level = model.schedule.grid(steps)[used_steps(steps, method.mask_strength)]
    return Masking(source, level, texts["target_prompt"], texts["reference_prompt"], method.samples, noise)


# --- mixed prompts ------------------------------------------------------------------------------------------------


def _mixes(job: EditJob) -> bool:
    return isinstance(job.method, DisentangledEdit)


def _edit_mixing(
    job: EditJob, source: Tensor, texts: "_Texts", noise: Callable[[str, int], Tensor], model: Facts
) -> Steps[Mixing]:
    """The mixing of an edit; ``source`` is its start where the model draws the picture, else the picture itself."""
    assert isinstance(job.method, DisentangledEdit)
    steps = len(job.method.weights)
    mixing = _mixing_of(texts, model, steps, job.guidance_scale, job.method.sampler, source)
    if isinstance(job.source, Generated):
        return mixing
    return (yield from disentangle.anchor(mixing, source, [noise("anchor", i) for i in range(steps)]))


def _learn(job: LearnJob, model: Facts) -> Steps[Result]:
    options = job.options
    texts = yield from _embed(
        source_prompt=options.source_prompt,
        target_prompt=options.target_prompt,
        negative_prompt=options.negative_prompt,
    )
    found = yield from together(*(_example(example, options, texts, model) for example in job.examples))
    mixings, references = zip(*found, strict=True)
    state = yield from disentangle.learn(Learning(mixings, references, options, job.state, job.iterations))
    if not all(isfinite(loss) for loss in state.losses):
        raise NonFiniteLatents("the loss left the numbers; use a smaller learning rate or guidance_scale")
    wanted = options.method.optimization_steps if isinstance(options.method, Descent) else 1
    return Learned(state, state.iteration >= wanted, Usage(), texts.notices)


def _example(
    example: Photo | Generated, options: LearnOptions, texts: "_Texts", model: Facts
) -> Steps[tuple[Mixing, Tensor]]:
    """A picture to learn on, and its latents (c, h, w) at a weight of 1."""
    steps = options.num_inference_steps
    if isinstance(example, Generated):
        start = _start(example, model)
        mixing = _mixing_of(texts, model, steps, options.guidance_scale, options.sampler, start)
        return mixing, (yield from disentangle.reference(mixing))
    source = yield from _encode(example, model)
    noise = _noise(options.seed, source, model)
    mixing = _mixing_of(texts, model, steps, options.guidance_scale, options.sampler, source)
    return (yield from disentangle.anchor(mixing, source, [noise("anchor", i) for i in range(steps)])), source


def _mixing_of(
    texts: "_Texts", model: Facts, steps: int, guidance_scale: float, sampler: Sampler, start: Tensor
) -> Mixing:
    return Mixing(
        grid=model.schedule.grid(steps),
        source_embeds=texts["source_prompt"],
        target_embeds=texts["target_prompt"],
        negative_embeds=texts["negative_prompt"],
        guidance_scale=guidance_scale,
        sampler=sampler,
        start=start,
        residuals=None,
    )


# --- parts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Texts:
    """Embeddings (tokens, width) by the role of their text, and what the encoder could not take in."""

    embeds: Mapping[str, Tensor]
    notices: tuple[Notice, ...]

    def __getitem__(self, role: str) -> Tensor:
        return self.embeds[role]


def _embed(**texts: str) -> Steps[_Texts]:
    """All texts of a job in one group, each once."""
    unique = list(dict.fromkeys(texts.values()))
    answers = dict(zip(unique, (yield [Embed(text) for text in unique]), strict=True))
    notices = tuple(
        Notice("PROMPT_TRUNCATED", f"{role} is longer than the text encoder reads; not read: '{answers[text].dropped}'")
        for role, text in texts.items()
        if answers[text].dropped
    )
    return _Texts({role: answers[text].prompt_embeds for role, text in texts.items()}, notices)


def _encode(photo: Photo, model: Facts) -> Steps[Tensor]:
    answers = yield [Encode(pictures.image(photo.pixels).to(model.device))]
    latents: Tensor = answers[0]
    return latents


def _draw(source: Generated, guidance_scale: float, texts: _Texts, model: Facts) -> Steps[Tensor]:
    """The picture a generated source stands for, as latents (c, h, w)."""
    guidance = Guidance(texts["source_prompt"], texts["empty"], guidance_scale)
    return (yield from denoise(_start(source, model), model.schedule.grid(source.num_inference_steps), guidance))


def _start(source: Generated, model: Facts) -> Tensor:
    shape = model.latent_shape(source.width, source.height)
    return standard_normal(shape, seed=source.seed, purpose="start").to(model.device)


def _noise(seed: int, like: Tensor, model: Facts) -> Callable[[str, int], Tensor]:
    shape = tuple(like.shape)
    return lambda purpose, index: standard_normal(shape, seed=seed, purpose=purpose, index=index).to(model.device)


def _no_noise(purpose: str, index: int) -> Tensor:
    raise AssertionError(f"a reconstruction draws no noise, but {purpose} {index} was asked for")


def _grid(options: InversionOptions, model: Facts) -> Grid:
    steps = options.num_inference_steps
    return model.schedule.grid(steps, used_steps(steps, options.strength))


def _mixing(options: InversionOptions | None) -> float:
    """EDICT's p: the inversion's, or its default where the pair is plain noise."""
    method = options.method if options is not None else None
    return method.mixing_coefficient if isinstance(method, EdictInversion) else EdictInversion().mixing_coefficient
