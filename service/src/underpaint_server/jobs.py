"""The nouns a caller knows: what can be asked for, and what comes back. No behaviour, no tensors of any framework.

Everything here is frozen and picklable, because jobs and results cross the boundary between the front process and the
engine process. Every option is resolved: defaults were filled in when the job was made, so a job says all there is to
know about its result. Pictures are ``numpy.uint8`` arrays of shape (height, width, 3), RGB; masks are (height, width).
"""

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Array = NDArray[Any]

MAX_GUIDANCE_SCALE: Final = 30.0
"""Largest classifier-free guidance weight that a request or a stored direction may have."""
MAX_MIXING_WEIGHT: Final = 1000.0
"""Largest absolute value of a mixing weight; learned ones stay far below."""


class Phase(Enum):
    """Which part of a job runs."""

    QUEUED = "queued"
    ENCODING = "encoding"
    INVERTING = "inverting"
    MASKING = "masking"
    DENOISING = "denoising"
    DECODING = "decoding"
    OPTIMIZING = "optimizing"


class Priority(IntEnum):
    """Order within the queue and within each step; larger goes first."""

    LEARNING = 0
    """Not for callers to choose: what learns has this one."""
    BATCH = 1
    NORMAL = 2
    INTERACTIVE = 3


class Interpolation(Enum):
    """How two activations are mixed, the second brought to the norm of the first before."""

    SLERP = "slerp"
    """Along the great circle: the norm stays."""
    LERP = "lerp"
    """Along the chord: the norm shrinks in between. A control."""


class DdimConvention(Enum):
    """The timestep the network is told while inverting a step s -> t, t the noisier."""

    TARGET = "target"
    CURRENT = "current"


class Sampler(Enum):
    """How noise predictions become a move."""

    DDIM = "ddim"
    """The last prediction alone (Song et al., ICLR 2021)."""
    PLMS = "plms"
    """The last four predictions, after a Heun step at the start (Liu et al., ICLR 2022)."""


# --- how to invert ----------------------------------------------------------------------------------------------


class InversionMethod:
    """Base of the options of every inversion; each one's own are in its folder under ``methods``."""

    __slots__ = ()

    name: ClassVar[str]
    """Field of InversionParameters, and name of the folder: "edict", "ddim"."""
    label: ClassVar[str]
    """For people, such as "EDICT"."""
    evaluations_per_step: ClassVar[int]
    """Guided predictions of one step, in either direction."""
    exact: ClassVar[bool]
    """Whether the way back must repeat the network's answers bit for bit."""
    default_guidance_scale: ClassVar[float]
    """While inverting, unless the request names one."""


@dataclass(frozen=True, slots=True)
class InversionOptions:
    """Everything besides image and model that decides the latents, and so the inversion's name."""

    method: InversionMethod
    num_inference_steps: int
    """Steps of the whole schedule, 1 .. limit."""
    strength: float
    """Share of the schedule that is inverted, (0, 1]; ``int(steps * strength)`` steps are used."""
    guidance_scale: float
    """Classifier-free guidance weight while inverting; 1 is off."""
    source_prompt: str
    """Text that describes the image."""


@dataclass(frozen=True, slots=True)
class Inversion:
    """A stored inversion: latents, and what is needed to use them again."""

    model: str
    model_digest: str
    options: InversionOptions
    width: int
    height: int
    batch_class: int | None
    """Rows of every forward pass it was made in; None where the backend's results do not depend on that."""
    arrays: dict[str, Array] = field(repr=False)
    """float64. ``source`` (c, h, w): the encoded image. EDICT: ``x`` and ``y`` (c, h, w), the coupled pair.
    DDIM: ``trajectory`` (n + 1, c, h, w), level 0 (the source) first; and ``h_mid``, ``h_up_1``, ... (n, c, h, w),
    float16, for each of its ``features``: the activations while step k was inverted."""
    fingerprint: str = ""
    """Of the function that made it, see :class:`ModelInfo`."""
    reconstruction_psnr_db: float | None = None
    reconstruction_max_abs_error: float | None = None


# --- what to edit -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Photo:
    """A real image at a size the model works at."""

    pixels: Picture = field(repr=False)


@dataclass(frozen=True, slots=True)
class Stored:
    """An inversion made before."""

    inversion: Inversion


@dataclass(frozen=True, slots=True)
class Generated:
    """A picture the model draws from noise; for DDIM and EDICT edits that noise is the inversion."""

    prompt: str
    seed: int
    width: int
    height: int
    num_inference_steps: int


Source = Photo | Stored | Generated


# --- how to edit ------------------------------------------------------------------------------------------------


class EditOptions:
    """Base of the options of every edit method; each one's own are in its folder under ``methods``."""

    __slots__ = ()

    name: ClassVar[str]
    """Field of EditRequest, entry of Model.methods, label in metrics and name of the folder, such as "diffedit"."""


# --- jobs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InvertJob:
    """Turn an image into latents to start from. Ends in :class:`Inverted`."""

    model: str
    source: Photo
    options: InversionOptions
    verify: bool
    """Also run the round trip and report its error."""
    inversion: Inversion | None = None
    """Made before from this very source and options: only the round trip is left to run."""


@dataclass(frozen=True, slots=True)
class Companion:
    """A second image that an edit takes something from, inverted beside the source; of the source's size."""

    source: Photo | Stored
    """A stored one has at least the arrays that the method reads."""
    inversion: InversionOptions
    """How it is inverted, or was."""


@dataclass(frozen=True, slots=True)
class EditJob:
    """Change an image. Ends in :class:`Edited`."""

    model: str
    source: Source
    inversion: InversionOptions | None
    """How to invert the source, or how it was; None where the method needs no inversion."""
    method: EditOptions
    target_prompt: str
    negative_prompt: str
    guidance_scale: float
    seed: int
    companion: Companion | None = None
    """Where the method takes something from a second image."""


@dataclass(frozen=True, slots=True)
class MaskJob:
    """Only the mask that an edit would use. Ends in :class:`Masked`."""

    model: str
    source: Source
    inversion: InversionOptions
    """Its ``num_inference_steps`` is the schedule; nothing is inverted."""
    method: EditOptions
    """Of a method that computes a mask."""
    target_prompt: str
    negative_prompt: str
    guidance_scale: float
    seed: int


@dataclass(frozen=True, slots=True)
class Descent:
    """Learn by gradients (Wu et al., section 4): Adam on the loss of the decoded picture."""

    optimization_steps: int
    """At least 1."""
    learning_rate: float
    """Adam's, > 0."""


@dataclass(frozen=True, slots=True)
class Search:
    """Learn without gradients: score step functions of the weights, keep the best."""

    switch_steps: tuple[int, ...]
    """Candidates for the number of steps that keep a weight of 1."""
    late_weights: tuple[float, ...]
    """Candidates for the weight of the steps after those."""


@dataclass(frozen=True, slots=True)
class LearnOptions:
    """What is learned, and how."""

    source_prompt: str
    target_prompt: str
    negative_prompt: str
    num_inference_steps: int
    """As many weights are learned."""
    sampler: Sampler
    guidance_scale: float
    switch_step: int
    """The weights begin as 1 for so many steps, [0, steps], and ``late_weight`` after."""
    late_weight: float
    content_weight: float
    """Of the loss that keeps the content, beside the directional one; >= 0."""
    method: Descent | Search
    seed: int
    """Of the noise that real pictures are encoded with."""


@dataclass(frozen=True, slots=True)
class LearnState:
    """How far learning has come: all that another process needs to go on."""

    iteration: int
    """Optimiser steps done."""
    weights: tuple[float, ...]
    """The ones to go on from."""
    first_moment: tuple[float, ...]
    """Adam's running mean of the gradient, one a weight."""
    second_moment: tuple[float, ...]
    """Adam's running mean of its square."""
    losses: tuple[float, ...]
    """Of the weights before each optimiser step, and of the last ones once all are done."""
    best_weights: tuple[float, ...]
    """Those of the smallest of these losses."""


@dataclass(frozen=True, slots=True)
class Direction:
    """A learned edit: its weights, and what is needed to use them again."""

    display_name: str
    """For people."""
    model: str
    model_digest: str
    options: LearnOptions
    """How it was learned."""
    weights: tuple[float, ...]
    """One a step, noisiest first, to the precision of float32."""
    losses: tuple[float, ...]
    """See :class:`LearnState`."""
    content_features: str
    """See :class:`ModelInfo`."""
    example_count: int
    """Pictures it was learned on."""
    operation: str = ""
    """Id of the operation that learned it."""


@dataclass(frozen=True, slots=True)
class LearnJob:
    """Learn a direction, or a part of that. Ends in :class:`Learned`."""

    model: str
    options: LearnOptions
    examples: tuple[Photo | Generated, ...]
    """What to learn on; generated ones with the source prompt and the options' steps."""
    state: LearnState | None
    """Where to go on; None at the start."""
    iterations: int
    """Optimiser steps to do in this job at most, so that what is learned so far can be kept between two jobs."""


Job = InvertJob | EditJob | MaskJob | LearnJob


# --- on the way, and at the end -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress:
    """A snapshot; a later one supersedes it."""

    phase: Phase
    step: int
    total_steps: int
    fraction: float
    """Share of the job's rows that are done, [0, 1], never falling."""
    queue_position: int = 0
    eta_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Preview:
    """What the picture would be if the network's present guess were final."""

    pixels: Picture = field(repr=False)
    step: int


@dataclass(frozen=True, slots=True)
class Notice:
    """Something to know that is no error; ``reason`` is PROMPT_TRUNCATED, MASK_EMPTY or MASK_FULL."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a job cost."""

    queue_time_s: float = 0.0
    compute_time_s: float = 0.0
    """Time of the passes it took part in, each counted once."""
    network_evaluations: int = 0
    """U-Net rows, guidance branches counted."""
    mean_batch_size: float = 0.0
    """Mean number of jobs that shared a pass with it, itself counted."""
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
    inversion: Inversion | None
    """Made on the way from a :class:`Photo`; None where none was made."""
    usage: Usage
    notices: tuple[Notice, ...] = ()
    companion: Inversion | None = None
    """The same of the companion."""


@dataclass(frozen=True, slots=True)
class Masked:
    """Result of :class:`MaskJob`."""

    mask: Picture = field(repr=False)
    difference: NDArray[np.float32] = field(repr=False)
    """(h, w) at latent resolution, normalised to [0, 1], before the cut."""
    coverage: float
    usage: Usage
    notices: tuple[Notice, ...] = ()


@dataclass(frozen=True, slots=True)
class Learned:
    """Result of :class:`LearnJob`."""

    state: LearnState
    done: bool
    """Whether nothing is left to learn."""
    usage: Usage
    notices: tuple[Notice, ...] = ()


Result = Inverted | Edited | Masked | Learned


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What one loaded model is and can do; the engine reports it, the front validates against it."""

    id: str
    """Without "models/"."""
    digest: str
    """sha256 over the weights and configurations."""
    dtype: str
    methods: tuple[str, ...]
    width: int
    height: int
    size_multiple: int
    """Sides of a picture are multiples of this, in pixels."""
    default_steps: int
    prompt_tokens: int
    """Length of the text encoder's context, markers included; 0 for a model that reads no text."""
    batch_class: int | None
    """Rows an exact job's passes are pinned to; None where the backend was measured not to need it."""
    content_features: str
    """Where the content loss of learning looks: "vae" or "vgg16"; empty where the model cannot learn."""
    gradients: bool
    """Whether learning can use gradients."""
    fingerprint: str
    """Digest of the bits of one fixed forward pass. Weights, dtype, device, threads and libraries all decide it; an
    exact inversion can be undone only by the very function that made it."""
    feature_sites: tuple[str, ...] = ()
    """Where the network's activations can be read and changed: "mid", "up_0", ..."""
