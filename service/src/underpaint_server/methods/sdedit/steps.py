"""SDEdit (Meng et al., ICLR 2022, algorithm 2): add noise to the image, denoise with the target prompt."""

from underpaint_server.diffusion.ddim import add_noise
from underpaint_server.diffusion.sampling import denoise
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.methods.task import Editing, Outcome
from underpaint_server.rows import Steps


def edit(task: Editing[SdEdit, None]) -> Steps[Outcome]:
    """Noise the source to the noisiest level of the grid with the job's noise, and denoise it."""
    noised = add_noise(task.arrays["source"], task.noise("sdedit", 0), task.grid[-1])
    return Outcome((yield from denoise(noised, task.grid, task.guidance)))
