"""Preparation of content injection: the content's activations, and the region and the steps of the injection."""

from underpaint_server.diffusion.ddim import inversion_levels
from underpaint_server.jobs import EditJob
from underpaint_server.methods.content_injection.options import ContentInjection, boosted_steps, injected_steps
from underpaint_server.methods.content_injection.steps import Content
from underpaint_server.methods.ddim.options import DdimInversion
from underpaint_server.methods.task import Context, Editing, Preparation, inversion_grid
from underpaint_server.models import tensors
from underpaint_server.rows import Steps


def _extra(task: Editing[ContentInjection, None], context: Context) -> Steps[Content]:
    yield from ()  # no rows: the content was inverted together with the source
    options, model = task.options, context.model
    assert isinstance(context.job, EditJob)
    assert context.job.companion is not None
    assert context.companion is not None
    assert task.inversion is not None
    inversion = context.job.companion.inversion
    assert isinstance(inversion.method, DdimInversion)
    levels = inversion_levels(inversion_grid(inversion, model), inversion.method.convention)
    region = options.region
    return Content(
        features={site: context.companion[f"h_{site}"] for site in options.sites},
        timesteps=[level.timestep for level in levels],
        region=None if region is None else tensors.latent_mask(region, task.arrays["source"], model),
        injected=injected_steps(options, task.inversion),
        boosted=boosted_steps(options, task.inversion),
    )


PREPARATION: Preparation[ContentInjection, Content] = Preparation(extra=_extra)
