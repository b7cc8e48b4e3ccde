"""Notices: what a caller may not expect of a result that is no error. Their reasons are listed in ``jobs.Notice``."""

import re
from collections.abc import Iterable, Mapping
from math import sqrt
from sys import float_info

from torch import Tensor

from underpaint_server.diffusion.schedule import Grid
from underpaint_server.jobs import EditJob, InversionOptions, InvertJob, MaskJob, Notice
from underpaint_server.models.facts import Facts

EXACT = 1e-10
"""Largest error of a latent that an exact inversion may have after a round trip."""
_ROUNDING = 10 * float_info.epsilon
"""Error of a round trip in units of the largest latent. Measured are 0.5 to 20 float64 epsilons: what is lost in the
last bits of large latents stays lost when they become small again."""
_SIGNAL = 0.3
"""Tolerated difference of the factor of the clean image, ``sqrt(alpha_bar)``, from what a strength means."""
_SYNTAX = re.compile(
    r"\([^()]*:\s*+[+-]?(?:\d++\.?\d*+|\.\d++)\s*+\)"  # (word:1.2)
    r"|\[[^\[\]:|]*[:|][^\[\]]*\]"  # [a:b:0.5] and [a|b]
    r"|\{[^{}|]*\|[^{}]*\}"  # {a|b}
    r"|\({2}[^()]*\){2}|\[{2}[^\[\]]*\]{2}"  # ((word))
    r"|<[a-z]+:[^<>]*>"  # <lora:name:0.8>
    r"|\b(?:BREAK|AND)\b"
    r"|\b\w{3,}\+{2,}|\)\+"  # word++ and (two words)+
)
"""Syntax of other programs for weights, alternatives, networks and several prompts in one. No part of it tries a text
again from each of its characters: that would hold up the engine for seconds."""


def about_syntax(texts: Mapping[str, str]) -> Iterable[Notice]:
    """PROMPT_SYNTAX for each prompt, by role, that has syntax of other programs."""
    for role, text in texts.items():
        found = _SYNTAX.search(text)
        if found:
            yield Notice(
                "PROMPT_SYNTAX",
                f"{role}: '{found[0]}' is read literally, because prompts have no syntax here; use plain words",
            )


def about_unused_prompts(job: EditJob | MaskJob | InvertJob) -> Iterable[Notice]:
    """PROMPT_UNUSED for each prompt that the guidance scale gives no effect."""
    if isinstance(job, MaskJob):
        if job.negative_prompt:
            yield _unused("negative_prompt", "a mask needs no guidance")
        return
    inversion = job.options if isinstance(job, InvertJob) else job.inversion
    if inversion is not None and inversion.source_prompt and inversion.guidance_scale == 0:
        yield _unused("source_prompt", "the guidance_scale of the inversion is 0")
    if isinstance(job, EditJob):
        if job.negative_prompt and job.guidance_scale == 1:
            yield _unused("negative_prompt", "guidance_scale is 1, which is no guidance")
        if job.target_prompt and job.guidance_scale == 0:
            yield _unused("target_prompt", "guidance_scale is 0")


def about_noise(grid: Grid, strength: float, model: Facts) -> Iterable[Notice]:
    """NOISE_TOO_LOW where steps are so few that their noisiest level has far less noise than ``strength`` means."""
    alphas, top = model.schedule.alphas_cumprod, grid[-1]
    meant = sqrt(alphas[max(1, round(strength * len(alphas))) - 1])
    if sqrt(top.alpha_bar) - meant > _SIGNAL:
        steps = f"{len(grid) - 1} step{'s' if len(grid) > 2 else ''}"
        yield Notice(
            "NOISE_TOO_LOW",
            f"the noisiest of {steps} is timestep {top.timestep} and keeps {sqrt(top.alpha_bar):.0%} of the image; "
            f"strength {strength:g} means {meant:.0%}: use more steps",
        )


def about_exactness(
    options: InversionOptions, arrays: Mapping[str, Tensor], measured: float | None = None
) -> Iterable[Notice]:
    """INVERSION_INEXACT for an exact inversion whose latents grew so large that rounding loses them.

    ``measured`` is the error of its round trip, if there was one.
    """
    if not options.method.exact:
        return
    largest = max(float(array.abs().max()) for array in arrays.values())
    error = _ROUNDING * largest if measured is None else measured
    if error > EXACT:
        yield Notice(
            "INVERSION_INEXACT",
            f"the latents grew to {largest:.1g} while inverting, so the way back differs by {error:.1g} from rounding; "
            "use fewer steps, a lower guidance_scale or, for EDICT, a mixing_coefficient closer to 1",
        )


def _unused(field: str, why: str) -> Notice:
    return Notice("PROMPT_UNUSED", f"{field} has no effect: {why}")
