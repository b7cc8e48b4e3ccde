"""From a LearnDirectionRequest to a draft of an operation: defaults are filled in, all invalid fields reported."""

import hashlib
import secrets
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

from underpaint.v1 import direction_service_pb2 as messages
from underpaint.v1 import types_pb2

from underpaint_server.errors import LearningUnsupported
from underpaint_server.jobs import MAX_GUIDANCE_SCALE, Descent, Generated, LearnOptions, ModelInfo, Sampler, Search
from underpaint_server.settings import Settings
from underpaint_server.stores.directions import NAME
from underpaint_server.wire.fields import Fields, float32
from underpaint_server.wire.names import is_request_id, model_name
from underpaint_server.wire.reader import sampler_of

MAX_DISPLAY_CHARS: Final = 200
MAX_EXAMPLES: Final = 16
MAX_OPTIMIZATION_STEPS: Final = 200
MAX_CANDIDATES: Final = 64

_OPTIMIZATION_STEPS: Final = 10
_LEARNING_RATE: Final = 0.05
_CONTENT_WEIGHT: Final = 0.05
_MAX_CONTENT_WEIGHT: Final = 100.0
_SWITCH_SHARE: Final = 0.4
_LATE_WEIGHTS: Final = (-2.0, 2.0)
_GUIDANCE: Final = 5.0
_CANDIDATE_SHARES: Final = (0.2, 0.3, 0.4, 0.5, 0.6)
_CANDIDATE_WEIGHTS: Final = (0.2, 0.0, -0.2)

_CALLERS: Final = {"display_name", "model", "source_prompt", "target_prompt", "steps", "sampler", "guidance_scale"}
"""Fields of ``direction`` that a caller may set; the server sets the others."""
_ONLY_GRADIENT: Final = ("optimization_steps", "learning_rate", "switch_step", "late_weight")


@dataclass(frozen=True, slots=True)
class LearnDraft:
    """What to learn; the images are still encoded."""

    operation: str
    """Id of the operation: a digest of the request id, random without one."""
    direction: str
    """Id of the direction."""
    is_named: bool
    """Whether the caller chose the direction's id."""
    display_name: str
    model: ModelInfo
    options: LearnOptions
    examples: tuple[types_pb2.Image | Generated, ...]


def learn_draft(request: messages.LearnDirectionRequest, model: ModelInfo, settings: Settings) -> LearnDraft:
    """Read a LearnDirectionRequest. Raises FieldInvalid with all invalid fields, LearningUnsupported."""
    return _Learn(request, model, settings).draft()


class _Learn:
    """Reads one LearnDirectionRequest."""

    def __init__(self, request: messages.LearnDirectionRequest, model: ModelInfo, settings: Settings) -> None:
        self._request = request
        self._model = model
        self._settings = settings
        self._fields = Fields()
        steps, limit = request.direction.steps, min(settings.max_steps, model.max_steps)
        self._steps = max(1, self._fields.count("direction.steps", steps, model.default_steps, limit))

    def draft(self) -> LearnDraft:
        request, fields, model = self._request, self._fields, self._model
        if not model.content_features:  # checked first, because it also makes some fields invalid
            raise LearningUnsupported(
                f"{model_name(model.id)} has no CLIP model, which learning needs to compare images with prompts: start"
                " the server with --clips",
                metadata={"resource_name": model_name(model.id)},
            )
        self._check_ids()
        options = self._options()
        examples = self._examples(options.source_prompt)
        display_name = fields.text("direction.display_name", request.direction.display_name, MAX_DISPLAY_CHARS)
        fields.check()
        return LearnDraft(
            operation=_operation_id(request.request_id),
            direction=request.direction_id or secrets.token_hex(8),
            is_named=bool(request.direction_id),
            display_name=display_name,
            model=model,
            options=options,
            examples=examples,
        )

    def _check_ids(self) -> None:
        request, fields = self._request, self._fields
        if request.request_id and not is_request_id(request.request_id):
            fields.report("request_id", "not a UUID of version 4; send one, or leave it empty")
        if request.direction_id and not NAME.fullmatch(request.direction_id):
            fields.report("direction_id", "must have 1 to 63 characters of a-z, 0-9 and -")
        for field, _ in request.direction.ListFields():
            if field.name not in _CALLERS:
                fields.report(f"direction.{field.name}", "must be empty: the server sets it")

    def _options(self) -> LearnOptions:
        request, fields, direction = self._request, self._fields, self._request.direction
        limit = self._settings.max_prompt_chars
        method = self._method()
        if direction.source_prompt.strip() and direction.source_prompt == direction.target_prompt:
            fields.report("direction.target_prompt", "must differ from direction.source_prompt")
        content = request.content_weight if request.HasField("content_weight") else _CONTENT_WEIGHT
        guidance = direction.guidance_scale if direction.HasField("guidance_scale") else _GUIDANCE
        late = request.late_weight if request.HasField("late_weight") else 0.0
        default_switch = round(_SWITCH_SHARE * self._steps)
        return LearnOptions(
            source_prompt=fields.text("direction.source_prompt", direction.source_prompt, limit, required=True),
            target_prompt=fields.text("direction.target_prompt", direction.target_prompt, limit, required=True),
            negative_prompt="",
            num_inference_steps=self._steps,
            sampler=sampler_of(fields, "direction.sampler", direction.sampler, Sampler.DDIM),
            guidance_scale=fields.between("direction.guidance_scale", guidance, 0, MAX_GUIDANCE_SCALE),
            switch_step=fields.index(
                "switch_step", request.switch_step if request.HasField("switch_step") else default_switch, self._steps
            ),
            late_weight=fields.between("late_weight", late, *_LATE_WEIGHTS),
            content_weight=fields.between("content_weight", content, 0, _MAX_CONTENT_WEIGHT),
            method=method,
            seed=request.seed if request.HasField("seed") else secrets.randbits(63),
        )

    def _method(self) -> Descent | Search:
        request, fields = self._request, self._fields
        fields.known("method", request.method, messages.LearnMethod.DESCRIPTOR)
        default = messages.LEARN_METHOD_GRADIENT if self._model.gradients else messages.LEARN_METHOD_SEARCH
        if (request.method or default) == messages.LEARN_METHOD_SEARCH:
            reason = "" if request.method else f", and {self._model.id} has no gradients here"
            for field, _ in request.ListFields():
                if field.name in _ONLY_GRADIENT:
                    fields.report(field.name, f"must be empty: a search does not use it{reason}")
            return self._search()
        if not self._model.gradients:
            fields.report(
                "method", f"{self._model.id} has no gradients here; leave it unset, or choose LEARN_METHOD_SEARCH"
            )
        if request.HasField("candidates"):
            fields.report("candidates", "must be empty: only LEARN_METHOD_SEARCH uses candidates")
        rate = request.learning_rate if request.HasField("learning_rate") else _LEARNING_RATE
        return Descent(
            optimization_steps=fields.count(
                "optimization_steps", request.optimization_steps, _OPTIMIZATION_STEPS, MAX_OPTIMIZATION_STEPS
            ),
            learning_rate=fields.fraction("learning_rate", rate),
        )

    def _search(self) -> Search:
        fields, candidates = self._fields, self._request.candidates
        default_switches = tuple(dict.fromkeys(round(share * self._steps) for share in _CANDIDATE_SHARES))
        count = (len(candidates.switch_steps) or len(default_switches)) * (
            len(candidates.late_weights) or len(_CANDIDATE_WEIGHTS)
        )
        if count > MAX_CANDIDATES:
            fields.report("candidates", f"has {count} pairs, more than the limit of {MAX_CANDIDATES}")
            return Search((), ())
        switch_steps = tuple(candidates.switch_steps) or default_switches
        late_weights = tuple(map(float32, candidates.late_weights)) or _CANDIDATE_WEIGHTS
        if not all(0 <= step <= self._steps for step in switch_steps):
            fields.report("candidates.switch_steps", f"a value is outside 0..{self._steps}")
        low, high = _LATE_WEIGHTS
        if not all(low <= weight <= high for weight in late_weights):
            fields.report("candidates.late_weights", f"a value is outside [{low:g}, {high:g}]")
        return Search(switch_steps, late_weights)

    def _examples(self, source_prompt: str) -> tuple[types_pb2.Image | Generated, ...]:
        examples, fields = self._request.examples, self._fields
        if not 1 <= len(examples) <= MAX_EXAMPLES:
            fields.report("examples", f"has {len(examples)} entries, must have 1..{MAX_EXAMPLES}")
        sources: list[types_pb2.Image | Generated] = []
        for index, example in enumerate(examples[:MAX_EXAMPLES]):
            if example.WhichOneof("source") == "image":
                fields.known(f"examples[{index}].image.fit", example.image.fit, types_pb2.Fit.DESCRIPTOR)
                sources.append(example.image)
            elif example.WhichOneof("source") == "seed":
                size = self._model.width, self._model.height
                sources.append(Generated(source_prompt, example.seed, *size, self._steps))
            else:
                fields.report(f"examples[{index}].source", "not set; choose image or seed")
        return tuple(sources)


def _operation_id(request_id: str) -> str:
    if not request_id:
        return uuid4().hex
    return hashlib.sha256(f"learn {request_id.lower()}".encode()).hexdigest()[:32]
