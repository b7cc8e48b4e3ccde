"""Sources, ways to invert, ways to edit, ways to learn: frozen dataclasses of settings that write their own messages.

A setting that is None or empty takes the default, which the server fills in and reports in ``resolved``.

To add a method, define it here and export it in ``__init__``. A subclass of its base that sets ``name`` is entered in
the table of that base. The command line derives a flag from each field, see ``_flags``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Self

from underpaint import _wire
from underpaint.choices import Fit as Fit
from underpaint.choices import Priority as Priority
from underpaint.choices import Sampler as Sampler
from underpaint.images import ImageLike
from underpaint.resources import Direction, InversionHandle, direction_name, is_inversion_name
from underpaint.v1 import direction_service_pb2 as direction_pb
from underpaint.v1 import edit_service_pb2 as edit_pb
from underpaint.v1 import inversion_service_pb2 as inversion_pb
from underpaint.v1 import types_pb2 as types_pb


class Convention(StrEnum):
    """The timestep passed to the network while DDIM inverts a step from a less noisy to a noisier level."""

    TARGET = "target"
    """The timestep of the noisier level, which the step goes to."""
    CURRENT = "current"
    """The timestep of the less noisy level, which the step starts from."""


class Interpolation(StrEnum):
    """How content injection mixes activations. Those of the content are first scaled to the norm of the source's."""

    SLERP = "slerp"
    """Spherical: the norm of the activations is kept."""
    LERP = "lerp"
    """Linear: the norm shrinks in between; for comparison."""


@dataclass(frozen=True, slots=True)
class Generated:
    """An image that the model draws from noise, as the source of an edit."""

    prompt: str
    """Text of the image."""
    seed: int | None = None
    """Seed of the noise, 0 to 2**64 - 1. Default: random, reported in ``resolved``."""
    width: int | None = None
    """Width in pixels, a multiple of ``Limits.size_multiple``. Default: the model's."""
    height: int | None = None
    """Height in pixels, a multiple of ``Limits.size_multiple``. Default: the model's."""
    steps: int | None = None
    """Steps of the schedule. Default: the model's."""


# --- the tables of methods --------------------------------------------------------------------------------------


class _Named(ABC):
    """Base of the bases: a subclass that sets ``name`` is entered in the table of its base under that name."""

    __slots__ = ()
    name: ClassVar[str]
    _table: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in cls.__dict__:
            cls._table[cls.name] = cls  # a dataclass with slots is created twice: the second class replaces the first


# --- how to invert ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class InversionMethod(_Named):
    """Base of the ways to invert."""

    _table: ClassVar[dict[str, type["InversionMethod"]]] = {}
    name: ClassVar[str]
    """Its field in the contract's ``InversionParameters``, and its name on the command line."""

    @abstractmethod
    def _write(self, parameters: inversion_pb.InversionParameters) -> None:
        """Set the field ``name``."""

    @classmethod
    @abstractmethod
    def _read(cls, parameters: inversion_pb.InversionParameters) -> Self:
        """What ``_write`` wrote, with the server's defaults filled in."""

    def _parameters(
        self, source_prompt: str, steps: int | None, strength: float | None, guidance_scale: float | None
    ) -> inversion_pb.InversionParameters:
        """The whole message: what all methods share, and the method."""
        numbers = _wire.given(steps=steps, strength=strength, guidance_scale=guidance_scale)
        parameters = inversion_pb.InversionParameters(source_prompt=source_prompt, **numbers)
        self._write(parameters)
        return parameters


INVERSION_METHODS = InversionMethod._table
"""Every way to invert, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EdictInversion(InversionMethod):
    """Exact inversion through two coupled latents (EDICT; Wallace et al., CVPR 2023)."""

    name = "edict"
    mixing_coefficient: float | None = None
    """EDICT's mixing coefficient p, (0, 1]: 1 mixes nothing, lower values couple both latents more. Default: 0.93."""

    def _write(self, parameters: inversion_pb.InversionParameters) -> None:
        message = inversion_pb.EdictInversion(**_wire.given(mixing_coefficient=self.mixing_coefficient))
        parameters.edict.CopyFrom(message)

    @classmethod
    def _read(cls, parameters: inversion_pb.InversionParameters) -> Self:
        return cls(mixing_coefficient=_wire.short(parameters.edict.mixing_coefficient))


@dataclass(frozen=True, slots=True, kw_only=True)
class DdimInversion(InversionMethod):
    """Approximate inversion by DDIM in reverse, cheaper than EDICT (Song et al., ICLR 2021)."""

    name = "ddim"
    convention: Convention | str | None = None
    """Timestep passed to the network while inverting. Default: target."""
    features: Sequence[str] = ()
    """Sites of the network whose activations are stored, for content injection. ``Model.feature_sites`` lists them.
    Default: none."""

    def _write(self, parameters: inversion_pb.InversionParameters) -> None:
        convention = _wire.number(inversion_pb.DdimConvention, Convention, "convention", self.convention)
        parameters.ddim.CopyFrom(inversion_pb.DdimInversion(convention=convention, features=self.features))

    @classmethod
    def _read(cls, parameters: inversion_pb.InversionParameters) -> Self:
        message = parameters.ddim
        convention = _wire.member(inversion_pb.DdimConvention, Convention, message.convention)
        return cls(convention=convention or Convention.TARGET, features=tuple(message.features))


DEFAULT_INVERSION = EdictInversion()
"""The method of ``Client.invert`` and ``underpaint invert`` when none is given."""


# --- how to edit ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EditMethod(_Named):
    """Base of the ways to edit."""

    _table: ClassVar[dict[str, type["EditMethod"]]] = {}
    name: ClassVar[str]
    """Its field in the contract's ``EditRequest``, its name in ``Model.methods`` and on the command line."""
    steps: int | None = None
    """Steps of the whole schedule. Default: the model's."""

    @abstractmethod
    def _write(self, request: edit_pb.EditRequest, source_prompt: str) -> None:
        """Set the field ``name``; ValueError for settings that contradict each other."""

    def _inversion(self, source_prompt: str) -> inversion_pb.InversionParameters | None:
        """How a photo is inverted for this edit; None when it is not inverted."""
        return None

    def _needs_target_prompt(self) -> bool:
        """Whether the edit needs a text of the result. A model that reads no text needs none either way."""
        return True

    @classmethod
    def _draws_noise(cls, request: edit_pb.EditRequest) -> bool:
        """Whether the edit uses noise from ``request.seed``; else a generated source's seed is the only one."""
        return True

    @classmethod
    def _second(cls, request: edit_pb.EditRequest) -> Any:
        """The message with the method's second image, or with an ``inversion`` of it; None if it takes none."""
        return None


EDIT_METHODS = EditMethod._table
"""Every way to edit, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _DdimInverting(EditMethod):
    """A method that starts from a DDIM inversion of the source."""

    strength: float | None = None
    """Share of the schedule that is run, (0, 1]: near 0 little is changed, 1 starts from pure noise. Default: 0.8."""
    convention: Convention | str | None = None
    """Timestep passed to the network while inverting. Default: target."""
    inversion_guidance_scale: float | None = None
    """Classifier-free guidance weight while inverting; 1 is off. Default: 1."""

    def _inversion(self, source_prompt: str) -> inversion_pb.InversionParameters:
        method = DdimInversion(convention=self.convention)
        return method._parameters(source_prompt, self.steps, self.strength, self.inversion_guidance_scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edict(EditMethod):
    """Invert exactly, denoise with the target prompt (EDICT; Wallace et al., CVPR 2023).

    Keeps what both prompts describe. All settings are those of the inversion: leave them out where the source is an
    inversion or a generated image.
    """

    name = "edict"
    strength: float | None = None
    """Share of the schedule that is run, (0, 1]: near 0 little is changed, 1 starts from pure noise. Default: 0.8."""
    mixing_coefficient: float | None = None
    """EDICT's mixing coefficient p, (0, 1]: 1 mixes nothing, lower values couple both latents more. Default: 0.93."""
    inversion_guidance_scale: float | None = None
    """Classifier-free guidance weight while inverting; 1 is off. Default: 3."""

    def _write(self, request: edit_pb.EditRequest, source_prompt: str) -> None:
        request.edict.SetInParent()

    def _inversion(self, source_prompt: str) -> inversion_pb.InversionParameters:
        method = EdictInversion(mixing_coefficient=self.mixing_coefficient)
        return method._parameters(source_prompt, self.steps, self.strength, self.inversion_guidance_scale)

    @classmethod
    def _draws_noise(cls, request: edit_pb.EditRequest) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ddim(_DdimInverting):
    """Invert with DDIM, denoise with the target prompt (Song et al., ICLR 2021).

    All settings are those of the inversion: leave them out where the source is an inversion or a generated image.
    """

    name = "ddim"

    def _write(self, request: edit_pb.EditRequest, source_prompt: str) -> None:
        request.ddim.SetInParent()

    @classmethod
    def _draws_noise(cls, request: edit_pb.EditRequest) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class SdEdit(EditMethod):
    """Add noise up to a strength, denoise with the target prompt (SDEdit, image-to-image; Meng et al., ICLR 2022)."""

    name = "sdedit"
    strength: float | None = None
    """Share of the schedule that is run, (0, 1]: near 0 little is changed, 1 starts from pure noise. Default: 0.8."""

    def _write(self, request: edit_pb.EditRequest, source_prompt: str) -> None:
        request.sdedit.CopyFrom(edit_pb.SdEdit(**_wire.given(strength=self.strength, steps=self.steps)))

    def _inversion(self, source_prompt: str) -> inversion_pb.InversionParameters | None:
        # Nothing is inverted. A source prompt is sent all the same, so that the server refuses it.
        return inversion_pb.InversionParameters(source_prompt=source_prompt) if source_prompt else None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffEdit(_DdimInverting):
    """Compute a mask from two prompts, edit inside it, keep the rest (DiffEdit; Couairon et al., ICLR 2023).

    ``steps``, ``strength``, ``convention`` and ``inversion_guidance_scale`` are those of the inversion: leave them out
    where the source is an inversion or a generated image.
    """

    name = "diffedit"
    mask: ImageLike | None = field(default=None, repr=False)
    """Mask that replaces the computed one: 8-bit grey, white is edited. Of the source's size, or of the result's."""
    threshold: float | None = None
    """Threshold of the normalised difference, (0, 1). Default: 0.5."""
    samples: int | None = None
    """Noise samples that the difference is averaged over. Default: 10."""
    mask_strength: float | None = None
    """Share of the schedule at which the difference is computed, (0, 1). Default: 0.5."""
    reference_prompt: str = ""
    """Prompt that the target prompt is compared with. Default: the empty prompt."""

    def _write(self, request: edit_pb.EditRequest, source_prompt: str) -> None:
        message = edit_pb.DiffEdit(
            mask=_wire.image(self.mask) if self.mask is not None else None,
            reference_prompt=self.reference_prompt,
            **_wire.given(threshold=self.threshold, samples=self.samples, mask_strength=self.mask_strength),
        )
        request.diffedit.CopyFrom(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disentangled(EditMethod):
    """Mix the embeddings of source and target prompt, with one weight for each step (Wu et al., CVPR 2023).

    Nothing is inverted. Set exactly one of ``direction``, ``switch_step`` and ``weights``. Prompts, guidance scale and
    sampler that are left out are those of the direction.
    """

    name = "disentangled"
    direction: Direction | str | None = None
    """Learned direction, or its name."""
    switch_step: int | None = None
    """Number of steps, from the noisiest, with the source prompt; the others have the target prompt."""
    weights: Sequence[float] | None = None
    """One weight for each step, noisiest first, -1000 to 1000: 1 is the source prompt, 0 the target prompt."""
    scale: float | None = None
    """Scale of the edit, -2 to 4: 0 changes nothing, 1 is as learned, below 0 is the opposite edit. Default: 1."""
    steps: int | None = None
    """Steps of the whole schedule; leave it out with a direction or a generated source. Default: the model's."""
    sampler: Sampler | str | None = None
    """How a step is computed. Default: the direction's, else ddim."""

    def _write(self, request: edit_pb.EditRequest, source_prompt: str) -> None:
        choices = _wire.given(direction=self.direction, switch_step=self.switch_step, weights=self.weights)
        if len(choices) != 1:
            raise ValueError(
                "Disentangled takes exactly one of direction, switch_step and weights; "
                + (f"leave out all but one of {', '.join(choices)}" if choices else "set one of them")
            )
        message = edit_pb.DisentangledEdit(
            source_prompt=source_prompt,
            sampler=_wire.number(types_pb.Sampler, Sampler, "sampler", self.sampler),
            **_wire.given(switch_step=self.switch_step, scale=self.scale, steps=self.steps),
        )
        if self.direction is not None:
            message.direction = direction_name(self.direction)
        if self.weights is not None:
            message.given.values.extend(self.weights)
            message.given.SetInParent()
        request.disentangled.CopyFrom(message)

    def _needs_target_prompt(self) -> bool:
        return self.direction is None

    @classmethod
    def _draws_noise(cls, request: edit_pb.EditRequest) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentInjection(_DdimInverting):
    """Draw the content of another image in the style of the source (Jeong, Kwon, Uh, WACV 2024).

    The network's activations are mixed with those recorded while the content was inverted. Needs no target prompt.
    ``steps``, ``strength``, ``convention`` and ``inversion_guidance_scale`` are those of the source's inversion: leave
    them out where the source is an inversion or a generated image.
    """

    name = "content_injection"
    content: ImageLike | InversionHandle = field(repr=False)
    """Image to take the content from, or an inversion of it that stores the activations of all ``sites``. Such an
    inversion is made with ``DdimInversion(features=...)``, at the size of the source."""
    content_fit: Fit | str | None = None
    """How a content image of another size is brought to the source's size. Default: crop."""
    weight: float | None = None
    """Share of the content in the mix, [0, 1]: 0 reconstructs the source. Default: 0.3."""
    calibration: float | None = None
    """The paper's omega, calibration of the skip connections, [0, 1]: 0 turns it off. Default: 0."""
    region: ImageLike | None = field(default=None, repr=False)
    """Mask of the region that takes the content: 8-bit grey, white takes it. Of the source's size, or of the result's.
    Pixels near the region change too, because later layers mix neighbouring activations. Default: the whole image."""
    injection_end: float | None = None
    """Share of the schedule at which injection ends, [0, 1): less noisy steps are not changed. Default: 0.4."""
    every: int | None = None
    """Inject in every n-th step, counted from the noisiest. Default: 1."""
    boosting_start: float | None = None
    """Share of the schedule below which each step but the last adds fresh noise, [0, 1]: 0 adds none. Default: 0."""
    interpolation: Interpolation | str | None = None
    """How activations are mixed. Default: slerp."""
    sites: Sequence[str] = ()
    """Sites of the network to inject at. ``Model.feature_sites`` lists them. Default: mid."""
    strength: float | None = None
    """Share of the schedule that is run, (0, 1]: 1 starts from pure noise. Default: 1."""

    def _write(self, request: edit_pb.EditRequest, source_prompt: str) -> None:
        names = ("weight", "calibration", "injection_end", "every", "boosting_start")
        message = edit_pb.ContentInjectionEdit(
            interpolation=_wire.number(edit_pb.Interpolation, Interpolation, "interpolation", self.interpolation),
            region=_wire.image(self.region) if self.region is not None else None,
            sites=self.sites,
            **_wire.given(**{name: getattr(self, name) for name in names}),
        )
        content = self.content
        if isinstance(content, InversionHandle) or is_inversion_name(content):
            if self.content_fit is not None:
                raise ValueError("content_fit: an inversion as content has its size already; leave it out")
            message.inversion = str(content)
        else:
            message.image.CopyFrom(_wire.image(content, self.content_fit, "content_fit"))
        request.content_injection.CopyFrom(message)

    def _needs_target_prompt(self) -> bool:
        return False

    @classmethod
    def _draws_noise(cls, request: edit_pb.EditRequest) -> bool:
        return bool(request.content_injection.boosting_start)

    @classmethod
    def _second(cls, request: edit_pb.EditRequest) -> Any:
        return request.content_injection


DEFAULT_EDIT = Edict()
"""The method of ``Client.edit`` and ``underpaint edit`` when none is given."""


# --- how to learn -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnMethod(_Named):
    """Base of the ways to learn a direction."""

    _table: ClassVar[dict[str, type["LearnMethod"]]] = {}
    name: ClassVar[str]
    """Its value in the contract's ``LearnMethod`` in lower case, and its name on the command line."""

    @abstractmethod
    def _write(self, request: direction_pb.LearnDirectionRequest) -> None:
        """Set ``method`` and the settings that are this method's."""


LEARN_METHODS = LearnMethod._table
"""Every way to learn, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientLearning(LearnMethod):
    """Optimise the mixing weights with Adam on the loss of the decoded image (Wu et al., CVPR 2023, section 4)."""

    name = "gradient"
    optimization_steps: int | None = None
    """Optimiser steps, at most 200. Default: 10."""
    learning_rate: float | None = None
    """Learning rate of Adam, (0, 1]. Default: 0.05."""
    switch_step: int | None = None
    """Number of steps, from the noisiest, whose weight starts at 1. Default: two fifths of all."""
    late_weight: float | None = None
    """Weight that the other steps start with, [-2, 2]. Default: 0."""

    def _write(self, request: direction_pb.LearnDirectionRequest) -> None:
        names = ("optimization_steps", "learning_rate", "switch_step", "late_weight")
        settings = _wire.given(**{name: getattr(self, name) for name in names})
        request.MergeFrom(direction_pb.LearnDirectionRequest(method=direction_pb.LEARN_METHOD_GRADIENT, **settings))


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLearning(LearnMethod):
    """Try all pairs of ``switch_steps`` and ``late_weights``, at most 64, and keep the pair with the smallest loss.

    Needs no gradients and costs less than :class:`GradientLearning`, which usually reaches a smaller loss.
    """

    name = "search"
    switch_steps: Sequence[int] = ()
    """Candidates for the number of steps, from the noisiest, with weight 1. Default: 20, 30, 40, 50 and 60 % of all."""
    late_weights: Sequence[float] = ()
    """Candidates for the weight of the other steps. Default: 0.2, 0 and -0.2."""

    def _write(self, request: direction_pb.LearnDirectionRequest) -> None:
        request.method = direction_pb.LEARN_METHOD_SEARCH
        candidates = direction_pb.SearchCandidates(switch_steps=self.switch_steps, late_weights=self.late_weights)
        if candidates.ByteSize():
            request.candidates.CopyFrom(candidates)
