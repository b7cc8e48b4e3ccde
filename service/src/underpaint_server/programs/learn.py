"""The program of a LearnJob: generate or encode the examples, do some optimiser steps, return the state."""

from math import isfinite

from torch import Tensor

from underpaint_server.diffusion.sampling import together
from underpaint_server.errors import NonFiniteLatents
from underpaint_server.jobs import Generated, Learned, LearnJob, LearnOptions, Photo, Result, Usage
from underpaint_server.methods.disentangled import learn as weights
from underpaint_server.methods.disentangled.prepare import mixing_of
from underpaint_server.methods.disentangled.steps import Mixing, anchor, reference
from underpaint_server.models.facts import Facts
from underpaint_server.programs import parts
from underpaint_server.programs.parts import Texts
from underpaint_server.rows import Steps


def learn(job: LearnJob, model: Facts) -> Steps[Result]:
    """The program of a LearnJob. Raises NonFiniteLatents."""
    options, total = job.options, job.options.method.optimization_steps
    texts = yield from parts.embed(
        source_prompt=options.source_prompt,
        target_prompt=options.target_prompt,
        negative_prompt=options.negative_prompt,
    )
    examples = yield from together(*(_example(example, options, texts, model) for example in job.examples))
    mixings, references = zip(*examples, strict=True)
    state = yield from weights.learn(weights.Learning(mixings, references, options, job.state, job.iterations))
    numbers = (*state.losses, *state.weights, *state.first_moment, *state.second_moment)
    if not all(isfinite(number) for number in numbers):
        raise NonFiniteLatents(
            f"the loss or its gradient became NaN or infinite by optimiser step {state.iteration} of {total}; "
            "use a smaller learning_rate or guidance_scale"
        )
    return Learned(state, state.iteration >= total, Usage(), texts.notices)


def _example(
    example: Photo | Generated, options: LearnOptions, texts: Texts, model: Facts
) -> Steps[tuple[Mixing, Tensor]]:
    """The mixing of an example, and the latents (c, h, w) of the unedited image."""
    steps = options.num_inference_steps
    if isinstance(example, Generated):
        start = parts.start(example, model)
        mixing = mixing_of(texts.embeds, model, steps, options.guidance_scale, options.sampler, start)
        return mixing, (yield from reference(mixing))
    source = yield from parts.encode(example, model)
    mixing = mixing_of(texts.embeds, model, steps, options.guidance_scale, options.sampler, source)
    return (yield from anchor(mixing, source, parts.noise(options.seed, source, model))), source
