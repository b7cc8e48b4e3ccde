"""Preparation of SDEdit: the grid is that of its own options, because nothing is inverted."""

from underpaint_server.diffusion.schedule import Grid
from underpaint_server.methods.cost import used_steps
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.methods.task import Preparation
from underpaint_server.models.facts import Facts


def _grid(options: SdEdit, model: Facts) -> Grid:
    steps = options.num_inference_steps
    return model.schedule.grid(steps, used_steps(steps, options.strength))


PREPARATION: Preparation[SdEdit, None] = Preparation(grid=_grid)
