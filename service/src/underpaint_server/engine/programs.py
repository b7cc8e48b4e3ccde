"""From a job to one generator: texts and image in, inversion, edit, image out.

The methods themselves are in ``algorithms``, what one of them needs beforehand in ``methods``. Here, in ``inverting``
and in ``learning`` they are put in order.
"""

from torch import Tensor

from underpaint_server import jobs
from underpaint_server.algorithms import EDITORS
from underpaint_server.diffusion.sampling import Guidance, together
from underpaint_server.diffusion.schedule import Grid
from underpaint_server.diffusion.tasks import Editing
from underpaint_server.engine import parts, pictures
from underpaint_server.engine.inverting import invert, run_inverter
from underpaint_server.engine.learning import learn
from underpaint_server.engine.methods import PREPARATIONS
from underpaint_server.engine.methods.diffedit import find_mask
from underpaint_server.engine.parts import Texts
from underpaint_server.engine.preparation import Preparation, Ready
from underpaint_server.jobs import (
    EdictEdit,
    EdictInversion,
    Edited,
    EditJob,
    EditMethod,
    Generated,
    Inversion,
    InvertJob,
    Job,
    LearnJob,
    MaskJob,
    Photo,
    Result,
    Stored,
    Usage,
)
from underpaint_server.models.facts import Facts
from underpaint_server.rows import Decode, Steps


def program(job: Job, model: Facts, batch_class: int | None) -> Steps[Result]:
    """The generator that answers ``job``; its result has an empty ``usage``, which is the engine's to fill."""
    match job:
        case InvertJob():
            return invert(job, model, batch_class)
        case EditJob():
            return _edit(job, model, batch_class)
        case MaskJob():
            return find_mask(job, model)
        case LearnJob():
            return learn(job, model)


def is_exact(job: Job) -> bool:
    """Whether the job's promise needs equal rows to give equal bits: all of EDICT does."""
    if isinstance(job, InvertJob):
        return isinstance(job.options.method, EdictInversion)
    return isinstance(job, EditJob) and isinstance(job.method, EdictEdit)


def _edit(job: EditJob, model: Facts, batch_class: int | None) -> Steps[Result]:
    preparation = PREPARATIONS[type(job.method)]
    texts = yield from _texts(job, preparation)
    recorded = content_made = None
    if job.content is not None:
        (arrays, made), (recorded, content_made) = yield from together(
            _arrays(job, preparation, texts, model, batch_class), _content_arrays(job.model, job.content, texts, model)
        )
    else:
        arrays, made = yield from _arrays(job, preparation, texts, model, batch_class)
    task = Editing(
        arrays=arrays,
        grid=_grid(job, preparation, model),
        guidance=Guidance(texts["target_prompt"], texts["negative_prompt"], job.guidance_scale),
        mixing_coefficient=parts.mixing_coefficient(job.inversion),
        noise=parts.noise(job.seed, arrays["source"], model),
        method=job.method,
    )
    if preparation.task is not None:
        task = yield from preparation.task(task, job.method, Ready(job, texts, model, recorded))
    outcome = yield from EDITORS[type(job.method)](task)
    pictures.check_finite(outcome.latents)
    (image,) = yield [Decode(outcome.latents)]
    mask_picture = None if outcome.mask is None else pictures.mask_picture(outcome.mask, model)
    notices = texts.notices + outcome.notices
    return Edited(pictures.picture(image), mask_picture, made, Usage(), notices, content_made)


def _texts(job: EditJob, preparation: Preparation[EditMethod]) -> Steps[Texts]:
    own = {
        "target_prompt": job.target_prompt,
        "negative_prompt": job.negative_prompt,
        "source_prompt": parts.source_prompt(job),
    }
    more = preparation.texts(job.method) if preparation.texts is not None else {}
    return parts.embed(**{**own, **more, "empty": ""})


def _grid(job: EditJob, preparation: Preparation[EditMethod], model: Facts) -> Grid:
    if preparation.grid is not None:
        return preparation.grid(job.method, model)
    if preparation.starts_from_noise and isinstance(job.source, Generated):
        return model.schedule.grid(job.source.num_inference_steps)
    assert job.inversion is not None
    return parts.grid(job.inversion, model)


def _arrays(
    job: EditJob, preparation: Preparation[EditMethod], texts: Texts, model: Facts, batch_class: int | None
) -> Steps[tuple[dict[str, Tensor], Inversion | None]]:
    """What the edit starts from, and the inversion that was made on the way, if one was."""
    source = job.source
    match source:
        case Stored(inversion=inversion):
            return pictures.arrays(inversion, model), None
        case Generated() if preparation.starts_from_noise:
            start = parts.start(source, model)  # the picture's own noise: nothing has to be inverted
            return {"source": start, "trajectory": start[None], "x": start, "y": start}, None
        case Generated():
            latents = yield from parts.draw(source, job.guidance_scale, texts, model)
        case Photo():
            latents = yield from parts.encode(source, model)
    if job.inversion is None:
        return {"source": latents}, None
    guidance = Guidance(texts["source_prompt"], texts["empty"], job.inversion.guidance_scale)
    made = yield from run_inverter(job.model, job.inversion, latents, guidance, model, batch_class)
    return pictures.arrays(made, model), made if isinstance(source, Photo) else None


def _content_arrays(
    model_id: str, content: jobs.Content, texts: Texts, model: Facts
) -> Steps[tuple[dict[str, Tensor], Inversion | None]]:
    """The content's inversion, and that again if it was made here: without text, which would be the source's."""
    if isinstance(content.source, Stored):
        return pictures.arrays(content.source.inversion, model), None
    latents = yield from parts.encode(content.source, model)
    guidance = Guidance(texts["empty"], texts["empty"], content.inversion.guidance_scale)
    made = yield from run_inverter(model_id, content.inversion, latents, guidance, model, None)
    return pictures.arrays(made, model), made
