"""The edits that all contenders make, as plain values: each becomes a call of our client, a job, or JSON."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from underpaint import ContentInjection, Ddim, DiffEdit, Edict, EditMethod, SdEdit
from underpaint_server.jobs import Companion, EditJob, EditOptions, Interpolation, InversionMethod, InversionOptions
from underpaint_server.jobs import Photo as JobPhoto
from underpaint_server.methods.content_injection.options import ContentInjection as ContentInjectionOptions
from underpaint_server.methods.ddim.options import DdimEdit, DdimInversion
from underpaint_server.methods.diffedit.options import DiffEdit as DiffEditOptions
from underpaint_server.methods.edict.options import EdictEdit, EdictInversion
from underpaint_server.methods.sdedit.options import SdEdit as SdEditOptions
from underpaint_server.plans import total_rows

from benchmarks import cases
from benchmarks.peers.setup import MODEL_ID

Pixels = NDArray[np.uint8]
GUIDANCE = {"sdedit": 3.0, "ddim": 3.0, "diffedit": 5.0, "edict": 3.0, "content_injection": 1.0}
"""Method -> guidance scale of the edit, the server's default."""
SAMPLES, MASK_STRENGTH, THRESHOLD = 10, 0.5, 0.5
"""DiffEdit's noise samples, their noise level and its threshold, the server's defaults."""
MIXING = 0.93
"""EDICT's mixing coefficient."""
_INJECTED, _INJECTION_END, _SITES = 0.3, 0.4, ("mid",)


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit of a photo of the model's own size."""

    method: str
    """A key of :data:`GUIDANCE`."""
    photo: bytes
    """PNG."""
    source_prompt: str
    target_prompt: str
    seed: int
    steps: int
    strength: float
    content: bytes = b""
    """PNG of the second image, of content injection only."""

    @property
    def kind(self) -> tuple[str, int, float]:
        """What decides how much work it is: method, steps and strength."""
        return self.method, self.steps, self.strength

    def call(self) -> dict[str, Any]:
        """The arguments of ``Client.edit``."""
        return {
            "source": self.photo, "target_prompt": self.target_prompt, "method": self._client_method(),
            "source_prompt": self.source_prompt, "seed": self.seed, "guidance_scale": GUIDANCE[self.method],
        }  # fmt: skip

    def job(self) -> EditJob:
        """The job that the server makes of it."""
        inversion = self._inversion()
        companion = None
        if self.content:
            assert inversion is not None
            options = InversionOptions(DdimInversion(features=_SITES), self.steps, self.strength, 1.0, "")
            companion = Companion(JobPhoto(pixels(self.content)), options)
        return EditJob(
            model=MODEL_ID,
            source=JobPhoto(pixels(self.photo)),
            inversion=inversion,
            method=self._options(),
            target_prompt=self.target_prompt,
            negative_prompt="",
            guidance_scale=GUIDANCE[self.method],
            seed=self.seed,
            companion=companion,
        )

    def rows(self) -> int:
        """Network rows that the server needs for it."""
        return total_rows(self.job())

    def to_json(self) -> dict[str, Any]:
        """As a value that JSON can hold."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        return plain | {name: base64.b64encode(plain[name]).decode() for name in ("photo", "content")}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """What :meth:`to_json` wrote."""
        return cls(**(value | {name: base64.b64decode(value[name]) for name in ("photo", "content")}))

    def _client_method(self) -> EditMethod:
        given: dict[str, Any] = {"steps": self.steps, "strength": self.strength}
        match self.method:
            case "sdedit":
                return SdEdit(**given)
            case "ddim":
                return Ddim(**given)
            case "diffedit":
                return DiffEdit(**given)
            case "edict":
                return Edict(**given)
            case _:
                return ContentInjection(content=self.content, **given)

    def _inversion(self) -> InversionOptions | None:
        if self.method == "sdedit":
            return None
        method: InversionMethod = EdictInversion() if self.method == "edict" else DdimInversion()
        scale = method.default_guidance_scale
        return InversionOptions(method, self.steps, self.strength, scale, self.source_prompt)

    def _options(self) -> EditOptions:
        match self.method:
            case "sdedit":
                return SdEditOptions(self.strength, self.steps)
            case "ddim":
                return DdimEdit()
            case "diffedit":
                return DiffEditOptions(None, THRESHOLD, SAMPLES, MASK_STRENGTH, "")
            case "edict":
                return EdictEdit()
            case _:
                return ContentInjectionOptions(
                    _INJECTED, 0.0, None, _INJECTION_END, 1, 0.0, Interpolation.SLERP, _SITES
                )


def make(method: str, number: int, steps: int, strength: float = 0.8) -> Edit:
    """The ``number``-th edit: photo, prompts and seed follow from the number.

    One pixel of the photo has the number as its colour, so that no server has an inversion of it from another edit.
    """
    known = _known()
    case, other = known[number * 7 % len(known)], known[(number * 7 + 31) % len(known)]
    injected = method == "content_injection"
    return Edit(
        method=method,
        photo=_marked(case.source, number),
        source_prompt="" if method == "sdedit" or injected else case.source_prompt,
        target_prompt="" if injected else case.target_prompt,
        seed=number,
        steps=steps,
        strength=strength,
        content=_marked(other.source, number) if injected else b"",
    )


def pixels(image: bytes) -> Pixels:
    """Pixels of an encoded image, (height, width, 3)."""
    return cases.pixels(Image.open(io.BytesIO(image))).copy()


def encoded(picture: Pixels) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def worst_psnr_db(pictures: Sequence[Pixels], references: Sequence[Pixels]) -> float:
    """The smallest PSNR of a picture against its reference in dB; 99 where all are equal to the last bit."""
    errors = [
        float(np.square(one.astype(np.float64) - other).mean()) for one, other in zip(pictures, references, strict=True)
    ]
    return 99.0 if max(errors) == 0 else float(10 * np.log10(255**2 / max(errors)))


@cache
def _known() -> list[cases.Case]:
    return cases.load()


def _marked(picture: Pixels, number: int) -> bytes:
    marked = picture.copy()
    marked[0, 0] = [number >> 16 & 255, number >> 8 & 255, number & 255]
    return encoded(marked)
