"""Preparing SDEdit: its schedule is its own, for nothing is inverted."""

from underpaint_server.diffusion.schedule import Grid
from underpaint_server.engine.preparation import Preparation
from underpaint_server.jobs import SdEdit
from underpaint_server.models.facts import Facts
from underpaint_server.plans import used_steps


def _grid(options: SdEdit, model: Facts) -> Grid:
    steps = options.num_inference_steps
    return model.schedule.grid(steps, used_steps(steps, options.strength))


PREPARATION = Preparation(starts_from_noise=False, grid=_grid)
