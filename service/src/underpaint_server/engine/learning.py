"""The program of a LearnJob: pictures to learn on, some steps of learning, the state after them."""

from math import isfinite

from torch import Tensor

from underpaint_server.algorithms import disentangle
from underpaint_server.diffusion.sampling import together
from underpaint_server.diffusion.tasks import Learning, Mixing
from underpaint_server.engine import parts
from underpaint_server.engine.methods.disentangled import anchored, mixing_of
from underpaint_server.engine.parts import Texts
from underpaint_server.errors import NonFiniteLatents
from underpaint_server.jobs import Descent, Generated, Learned, LearnJob, LearnOptions, Photo, Result, Usage
from underpaint_server.models.facts import Facts
from underpaint_server.rows import Steps


def learn(job: LearnJob, model: Facts) -> Steps[Result]:
    """The program of a LearnJob; raises NonFiniteLatents."""
    options = job.options
    texts = yield from parts.embed(
        source_prompt=options.source_prompt,
        target_prompt=options.target_prompt,
        negative_prompt=options.negative_prompt,
    )
    found = yield from together(*(_example(example, options, texts, model) for example in job.examples))
    mixings, references = zip(*found, strict=True)
    state = yield from disentangle.learn(Learning(mixings, references, options, job.state, job.iterations))
    if not all(isfinite(loss) for loss in state.losses):
        raise NonFiniteLatents("the loss left the numbers; use a smaller learning rate or guidance_scale")
    wanted = options.method.optimization_steps if isinstance(options.method, Descent) else 1
    return Learned(state, state.iteration >= wanted, Usage(), texts.notices)


def _example(
    example: Photo | Generated, options: LearnOptions, texts: Texts, model: Facts
) -> Steps[tuple[Mixing, Tensor]]:
    """A picture to learn on, and its latents (c, h, w) at a weight of 1."""
    steps = options.num_inference_steps
    if isinstance(example, Generated):
        start = parts.start(example, model)
        mixing = mixing_of(texts, model, steps, options.guidance_scale, options.sampler, start)
        return mixing, (yield from disentangle.reference(mixing))
    source = yield from parts.encode(example, model)
    mixing = mixing_of(texts, model, steps, options.guidance_scale, options.sampler, source)
    return (yield from anchored(mixing, source, steps, parts.noise(options.seed, source, model))), source
