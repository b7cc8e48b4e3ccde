"""Linear multistep formulas: predictions of earlier steps make a later step more accurate (Liu et al., ICLR 2022).

The first step of PLMS is Heun's (the mean of the predictions at both ends); all others weigh the last predictions by
the Adams-Bashforth formula of as many of them as there are, up to four (eq. 12 there). DDIM is the formula of one.
"""

from underpaint_server.jobs import Sampler

ADAMS_BASHFORTH: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the last predictions, newest first, by how many there are."""


def multistep_weights(sampler: Sampler, step_index: int) -> tuple[float, ...]:
    """Weights of the predictions of this step and those before it, newest first."""
    if sampler is Sampler.DDIM:
        return ADAMS_BASHFORTH[0]
    return ADAMS_BASHFORTH[min(step_index, len(ADAMS_BASHFORTH) - 1)]


def is_heun(sampler: Sampler, step_index: int) -> bool:
    """Whether this step also asks for the prediction at its far end, and takes the mean of both."""
    return sampler is Sampler.PLMS and step_index == 0
