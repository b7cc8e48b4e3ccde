"""Linear multistep formulas: a step uses a weighted mean of the last noise predictions (Liu et al., ICLR 2022).

The first step of PLMS is Heun's: the mean of the predictions at both of its ends. All later ones weight the last
predictions, up to four, by the Adams-Bashforth formula for their number (eq. 12). DDIM uses the last prediction alone.
"""

from underpaint_server.jobs import Sampler

ADAMS_BASHFORTH: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the last predictions, newest first, for one to four of them."""


def multistep_weights(sampler: Sampler, step_index: int) -> tuple[float, ...]:
    """Weights of the predictions of step ``step_index`` (0 is the noisiest) and of the steps before it, newest
    first."""
    if sampler is Sampler.DDIM:
        return ADAMS_BASHFORTH[0]
    return ADAMS_BASHFORTH[min(step_index, len(ADAMS_BASHFORTH) - 1)]


def is_heun(sampler: Sampler, step_index: int) -> bool:
    """Whether this step uses the mean of the predictions at both of its ends; only the first step of PLMS does."""
    return sampler is Sampler.PLMS and step_index == 0
