"""Preparing content injection: the content's features, where and in which steps they go in."""

from dataclasses import replace

from underpaint_server.diffusion.ddim import told
from underpaint_server.diffusion.tasks import Content, Editing
from underpaint_server.engine import parts, pictures
from underpaint_server.engine.preparation import Preparation, Ready
from underpaint_server.jobs import ContentInjection, DdimInversion
from underpaint_server.plans import boosted_steps, injected_steps
from underpaint_server.rows import Steps


def _task(task: Editing, options: ContentInjection, ready: Ready) -> Steps[Editing]:
    yield from ()  # the content was inverted together with the source
    job, model, recorded = ready.job, ready.model, ready.content
    assert job.content is not None
    assert job.inversion is not None
    assert recorded is not None
    way = job.content.inversion.method
    assert isinstance(way, DdimInversion)
    region = None if options.region is None else pictures.latent_mask(options.region, task.arrays["source"], model)
    content = Content(
        features={site: recorded[f"h_{site}"] for site in options.sites},
        timesteps=[level.timestep for level in told(parts.grid(job.content.inversion, model), way.convention)],
        region=region,
        injected=injected_steps(options, job.inversion),
        boosted=boosted_steps(options, job.inversion),
    )
    return replace(task, content=content)


PREPARATION = Preparation(task=_task)
