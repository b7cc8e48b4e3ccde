"""Jobs and their results: plain data, without behaviour and without tensors of any framework.

Everything here is frozen and can be pickled, because jobs and results are sent between the front process and the engine
process. Every option of a job has its final value: defaults were filled in when the job was made, so equal jobs have
equal results.
"""

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""Decoded pixels: uint8, (height, width, 3), RGB; a mask is (height, width), 0 or 255."""
Array = NDArray[Any]

MAX_GUIDANCE_SCALE: Final = 30.0
"""Largest guidance scale that a request or a stored direction may have."""
MAX_MIXING_WEIGHT: Final = 1000.0
"""Largest absolute value of a weight of a disentangled edit. Learned weights are far smaller."""


class Phase(Enum):
    """The part of a job that is running."""

    QUEUED = "queued"
    ENCODING = "encoding"
    INVERTING = "inverting"
    MASKING = "masking"
    DENOISING = "denoising"
    DECODING = "decoding"
    OPTIMIZING = "optimizing"


class Priority(IntEnum):
    """Priority in the queue and in each forward pass; a larger value goes first."""

    LEARNING = 0
    """Of every :class:`LearnJob`; callers cannot choose it."""
    BATCH = 1
    NORMAL = 2
    INTERACTIVE = 3


class Interpolation(Enum):
    """How two activations are mixed, after the second is scaled to the norm of the first."""

    SLERP = "slerp"
    """Spherical interpolation: keeps the norm."""
    LERP = "lerp"
    """Linear interpolation: the norm shrinks in between. For comparison with SLERP."""


class DdimConvention(Enum):
    """The timestep passed to the network when DDIM inversion goes from level s to the noisier level t."""

    TARGET = "target"
    """The timestep of t."""
    CURRENT = "current"
    """The timestep of s."""


class Sampler(Enum):
    """The sampler: how many noise predictions a step uses."""

    DDIM = "ddim"
    """The last prediction alone (Song et al., ICLR 2021)."""
    PLMS = "plms"
    """The last four predictions, after a Heun step at the start (Liu et al., ICLR 2022)."""


class Exactness(Enum):
    """Which passes of a network give a row the same bits, whatever other rows they have."""

    ANY_SIZE = "any_size"
    """Passes of every size."""
    ROW_BY_ROW = "row_by_row"
    """Passes of every size, because each row is computed by itself: rows that are computed together have other bits, or
    it is not known whether they have."""
    FIXED_SIZE = "fixed_size"
    """Passes of one size: those of another size have other bits, or it is not known whether they have."""
    INEXACT = "inexact"
    """None: equal rows do not have equal bits, so no inversion is exact."""


# --- how to invert ----------------------------------------------------------------------------------------------


class InversionMethod:
    """Base class of the options of an inversion method; each subclass is in its folder under ``methods``."""

    __slots__ = ()

    name: ClassVar[str]
    """Name of its field in InversionParameters and of its folder: "edict" or "ddim"."""
    label: ClassVar[str]
    """Display name, such as "EDICT"."""
    evaluations_per_step: ClassVar[int]
    """Guided noise predictions of one step, inverting or denoising."""
    exact: ClassVar[bool]
    """Whether denoising must get bitwise the same noise predictions as inverting did."""
    default_guidance_scale: ClassVar[float]
    """Guidance scale of the inversion where the request names none."""


@dataclass(frozen=True, slots=True)
class InversionOptions:
    """Everything besides the image and the model that decides an inversion's latents, and so its name."""

    method: InversionMethod
    num_inference_steps: int
    """Steps of the whole schedule, at least 1."""
    strength: float
    """Share of the schedule that is inverted, (0, 1]: ``int(steps * strength)`` steps, at least 1."""
    guidance_scale: float
    """Guidance scale of the inversion (classifier-free guidance), 0 to 30; 1 is no guidance."""
    source_prompt: str
    """Describes the image; may be empty."""


@dataclass(frozen=True, slots=True)
class Notice:
    """A property of a result that is no error but that its caller may not expect."""

    reason: str
    """PROMPT_TRUNCATED, PROMPT_SYNTAX, PROMPT_UNUSED, NOISE_TOO_LOW, INVERSION_INEXACT, MASK_EMPTY or MASK_FULL."""
    message: str
    """For people."""


@dataclass(frozen=True, slots=True)
class Inversion:
    """An inversion: its latents, and what is needed to use them again."""

    model: str
    """Id of the model that made it."""
    model_digest: str
    """See :class:`ModelInfo`."""
    options: InversionOptions
    width: int
    """Of the image, in pixels."""
    height: int
    """Of the image, in pixels."""
    batch_class: int | None
    """Rows of each forward pass that it was made in, which is also that of edits from it; None where that number does
    not change the result."""
    arrays: dict[str, Array] = field(repr=False)
    """By name, float64 unless stated. ``source`` (c, h, w): the encoded image. EDICT: ``x`` and ``y`` (c, h, w), the
    coupled latents. DDIM of n steps: ``trajectory`` (n + 1, c, h, w), the latents at each level, the source first; and
    for each feature site in its ``features``, ``h_mid``, ``h_up_1``, ... (n, c, h, w), float16: the activations of each
    step."""
    fingerprint: str = ""
    """See :class:`ModelInfo`."""
    reconstruction_psnr_db: float | None = None
    """Of the reconstructed image against the image, in dB; None where it was not measured."""
    reconstruction_max_abs_error: float | None = None
    """Largest absolute difference of a reconstructed latent from its source; None where it was not measured."""
    notices: tuple[Notice, ...] = ()
    """What its caller may not expect of it."""


# --- what to edit -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Photo:
    """An image that the caller sent, at a size the model works at."""

    pixels: Picture = field(repr=False)


@dataclass(frozen=True, slots=True)
class Stored:
    """An inversion from the store."""

    inversion: Inversion


@dataclass(frozen=True, slots=True)
class Generated:
    """A generated source: an image that the model generates from noise. Most methods start from that noise instead of
    an inversion, see ``methods.base.Method.starts_from_noise``."""

    prompt: str
    seed: int
    """Of the noise."""
    width: int
    """In pixels."""
    height: int
    """In pixels."""
    num_inference_steps: int
    """Steps of the whole schedule."""


Source = Photo | Stored | Generated


# --- how to edit ------------------------------------------------------------------------------------------------


class EditOptions:
    """Base class of the options of an edit method; each subclass is in its folder under ``methods``."""

    __slots__ = ()

    name: ClassVar[str]
    """Name of its field in EditRequest, its entry in Model.methods, its label in metrics and its folder: "diffedit"."""


# --- jobs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InvertJob:
    """Invert an image. Its result is :class:`Inverted`."""

    model: str
    source: Photo
    options: InversionOptions
    verify: bool
    """Whether to denoise the inversion as well and measure the reconstruction error."""
    inversion: Inversion | None = None
    """The stored inversion of this source and these options, if there is one; then only ``verify`` is left to do."""


@dataclass(frozen=True, slots=True)
class Companion:
    """The second image of an edit, inverted along with the source; it has the source's size."""

    source: Photo | Stored
    """A stored inversion has at least the arrays that the method reads."""
    inversion: InversionOptions
    """How it is inverted, or was if it is stored."""


@dataclass(frozen=True, slots=True)
class EditJob:
    """Edit an image. Its result is :class:`Edited`."""

    model: str
    source: Source
    inversion: InversionOptions | None
    """How the source is inverted, was if it is stored, or would be if it is generated; None where the method has no
    inversion."""
    method: EditOptions
    target_prompt: str
    negative_prompt: str
    guidance_scale: float
    seed: int
    companion: Companion | None = None
    """The second image, where the method uses one."""


@dataclass(frozen=True, slots=True)
class MaskJob:
    """Compute only the mask of an edit. Its result is :class:`Masked`."""

    model: str
    source: Source
    inversion: InversionOptions
    """Only its ``num_inference_steps`` and ``source_prompt`` are used; nothing is inverted."""
    method: EditOptions
    """Of a method that computes a mask, such as DiffEdit."""
    target_prompt: str
    negative_prompt: str
    guidance_scale: float
    seed: int


@dataclass(frozen=True, slots=True)
class Descent:
    """Learn with gradients: Adam on the loss of the decoded image (Wu et al., CVPR 2023, section 4)."""

    optimization_steps: int
    """At least 1."""
    learning_rate: float
    """Adam's learning rate, > 0."""


@dataclass(frozen=True, slots=True)
class Search:
    """Learn without gradients: compute the loss of several step functions of the weights and keep the best."""

    optimization_steps: ClassVar[int] = 1

    switch_steps: tuple[int, ...]
    """Candidates for the number of first steps whose weight is 1."""
    late_weights: tuple[float, ...]
    """Candidates for the weight of the later steps."""


@dataclass(frozen=True, slots=True)
class LearnOptions:
    """What a direction is learned for, and how."""

    source_prompt: str
    target_prompt: str
    negative_prompt: str
    num_inference_steps: int
    """Steps of the whole schedule; one weight per step is learned."""
    sampler: Sampler
    guidance_scale: float
    switch_step: int
    """The weights of the first ``switch_step`` steps, 0 to the number of steps, are initially 1."""
    late_weight: float
    """Initial weight of the later steps."""
    content_weight: float
    """Factor of the content loss in the total loss, which also has the directional loss; >= 0."""
    method: Descent | Search
    seed: int
    """Of the noise that photos are noised with to compute their residuals."""


@dataclass(frozen=True, slots=True)
class LearnState:
    """The state of learning: all that another process needs to continue it."""

    iteration: int
    """Number of optimiser steps done."""
    weights: tuple[float, ...]
    """Current weights, one per step, noisiest first."""
    first_moment: tuple[float, ...]
    """Adam's running mean of the gradient, one per weight."""
    second_moment: tuple[float, ...]
    """Adam's running mean of the squared gradient, one per weight."""
    losses: tuple[float, ...]
    """Loss before each optimiser step; after the last step also the loss of the final weights."""
    best_weights: tuple[float, ...]
    """The weights with the smallest of these losses."""


@dataclass(frozen=True, slots=True)
class Direction:
    """A learned edit: its weights, and what is needed to use them again."""

    display_name: str
    """Chosen by the caller; may be empty."""
    model: str
    """Id of the model it was learned on."""
    model_digest: str
    """See :class:`ModelInfo`."""
    options: LearnOptions
    """How it was learned."""
    weights: tuple[float, ...]
    """The best weights, one per step, noisiest first, rounded to float32."""
    losses: tuple[float, ...]
    """See :class:`LearnState`."""
    content_features: str
    """See :class:`ModelInfo`."""
    example_count: int
    """Number of images it was learned on."""
    operation: str = ""
    """Id of the operation that learned it; empty if it was not learned by one."""


@dataclass(frozen=True, slots=True)
class LearnJob:
    """Do some optimiser steps of learning a direction. Its result is :class:`Learned`."""

    model: str
    options: LearnOptions
    examples: tuple[Photo | Generated, ...]
    """Images to learn on. Generated sources have the source prompt and the steps of ``options``."""
    state: LearnState | None
    """State to continue from; None at the start."""
    iterations: int
    """Largest number of optimiser steps in this job; the state is saved between two jobs."""


Job = InvertJob | EditJob | MaskJob | LearnJob


# --- progress and results ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a job at one moment."""

    phase: Phase
    step: int
    """Finished steps of the phase."""
    total_steps: int
    """Steps of the phase."""
    fraction: float
    """Share of the job's network rows that are done, [0, 1]; never decreases."""
    queue_position: int = 0
    """Position in the queue, 1 is the next; 0 once it runs."""
    eta_s: float = 0.0
    """Estimated seconds to the result."""


@dataclass(frozen=True, slots=True)
class Preview:
    """The image that the current noise prediction stands for (the decoded ``pred_x0``), while a job runs."""

    pixels: Picture = field(repr=False)
    step: int
    """Finished steps of the phase."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a job cost."""

    queue_time_s: float = 0.0
    """Seconds from admission to the first forward pass."""
    compute_time_s: float = 0.0
    """Seconds of the forward passes that had rows of the job; the full time of each pass."""
    network_evaluations: int = 0
    """Network rows that the result needed; guidance needs two for one prediction."""
    reused_evaluations: int = 0
    """Those of them that were not computed for this job: another one needed the same row, now or before."""
    mean_batch_size: float = 0.0
    """Mean number of jobs in a forward pass of this job, itself included."""
    phase_s: dict[Phase, float] = field(default_factory=dict)
    """Seconds from the first to the last row of each phase."""


@dataclass(frozen=True, slots=True)
class Inverted:
    """Result of :class:`InvertJob`."""

    inversion: Inversion
    usage: Usage
    notices: tuple[Notice, ...] = ()


@dataclass(frozen=True, slots=True)
class Edited:
    """Result of :class:`EditJob`."""

    pixels: Picture = field(repr=False)
    mask: Picture | None = field(repr=False)
    """(height, width), 255 = was edited; None where the method has no mask."""
    inversion: Inversion | None
    """The inversion of a :class:`Photo` that the edit made; None where it made none."""
    usage: Usage
    notices: tuple[Notice, ...] = ()
    companion: Inversion | None = None
    """The inversion of the companion's :class:`Photo`; None where the edit made none."""


@dataclass(frozen=True, slots=True)
class Masked:
    """Result of :class:`MaskJob`."""

    mask: Picture = field(repr=False)
    """(height, width), 255 = would be edited."""
    difference: NDArray[np.float32] = field(repr=False)
    """(h, w) at latent resolution, normalised to [0, 1], before the threshold."""
    coverage: float
    """Share of the mask that would be edited, [0, 1]."""
    usage: Usage
    notices: tuple[Notice, ...] = ()


@dataclass(frozen=True, slots=True)
class Learned:
    """Result of :class:`LearnJob`."""

    state: LearnState
    done: bool
    """Whether all optimiser steps are done."""
    usage: Usage
    notices: tuple[Notice, ...] = ()


Result = Inverted | Edited | Masked | Learned


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Properties of one loaded model. The engine process reports them, the front process validates requests with
    them."""

    id: str
    """Without "models/"."""
    digest: str
    """sha256 over the weight and configuration files."""
    dtype: str
    """Number format of the network, such as "float32"."""
    methods: tuple[str, ...]
    """Names of the edit methods that it can run."""
    width: int
    """Default width of an image, in pixels."""
    height: int
    """Default height of an image, in pixels."""
    size_multiple: int
    """Width and height of an image are multiples of this, in pixels."""
    default_steps: int
    """Steps of a request that names no number."""
    prompt_tokens: int
    """Length of the text encoder's context in tokens, start and end tokens included; 0 for a model without text."""
    batch_class: int | None
    """Rows of each forward pass at the model's own size; None where it was measured that this number does not matter.
    See :meth:`batch_class_at`."""
    content_features: str
    """Network whose features the content loss compares: "vae" or "vgg16"; empty where the model cannot learn."""
    gradients: bool
    """Whether it can learn with :class:`Descent`."""
    fingerprint: str
    """Digest of the result of one fixed forward pass. It depends on weights, dtype, device, threads and libraries; an
    exact inversion can be used only where the fingerprint is the one it was made with."""
    max_steps: int = 1000
    """Largest number of steps of its schedule; the server's own limit may be smaller."""
    feature_sites: tuple[str, ...] = ()
    """Names of the sites where activations can be captured and changed: "mid", "up_0", ..."""
    other_batch_class: int | None = None
    """Rows of each forward pass at other sizes than the model's own, which are not measured; None where the number does
    not change the result there either."""
    backend: str = "torch"
    """What computes its networks: "torch", "openvino" or "onnxruntime"."""
    exactness: Exactness = Exactness.ANY_SIZE
    """Which passes at the model's own size give a row the same bits, as far as this is known."""

    def batch_class_at(self, width: int, height: int) -> int | None:
        """Batch class of noise predictions for images of this size, in pixels: the number of rows of their passes; None
        where it does not matter. It is smaller for images of more than twice the model's area, which need more memory.
        """
        if (width, height) == (self.width, self.height):
            return self.batch_class
        if self.other_batch_class is None:
            return None
        affordable = 2 * self.other_batch_class * self.width * self.height // (width * height)
        return max(2, min(self.other_batch_class, affordable))
