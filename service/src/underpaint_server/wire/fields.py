"""Checks of single fields. All violations of a request are reported together."""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from google.protobuf.descriptor import EnumDescriptor

from underpaint_server.errors import FieldInvalid, FieldViolation, NonFiniteLatents

DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_SIZE: Final = 1000
"""Most entries of a page of a listing."""


class Fields:
    """Collects violations; ``check`` raises all of them as one :class:`FieldInvalid`.

    Each checking method takes the field's path in the request and its value, reports the field if the value is invalid,
    and returns a value to continue with.
    """

    def __init__(self) -> None:
        self._violations: list[FieldViolation] = []

    def report(self, path: str, description: str) -> None:
        """Report the field at ``path``; ``description`` says what is wrong and what to send."""
        self._violations.append(FieldViolation(path, description))

    def report_all(self, error: FieldInvalid) -> None:
        """Report the violations that another check raised."""
        self._violations.extend(error.violations)

    def check(self) -> None:
        """Raise FieldInvalid if anything was reported."""
        if self._violations:
            raise FieldInvalid(*self._violations)

    def fraction(self, path: str, value: float, *, below_one: bool = False) -> float:
        """A number in (0, 1], or in (0, 1) if ``below_one``, as :func:`float32`."""
        number = float32(value)
        if not (0 < number < 1 or (number == 1 and not below_one)):
            self.report(path, f"{value:.7g} is outside (0, 1{')' if below_one else ']'}")
        return number

    def between(self, path: str, value: float, low: float, high: float) -> float:
        """A number in [low, high], as :func:`float32`."""
        number = float32(value)
        if not low <= number <= high:
            self.report(path, f"{value:.7g} is outside [{low:g}, {high:g}]")
        return number

    def count(self, path: str, value: int, default: int, limit: int) -> int:
        """An integer in 1..limit; 0 means ``default``.

        An invalid value is reported and replaced by ``default``, because later fields are sized by it.
        """
        if not 0 <= value <= limit:
            self.report(path, f"{value} is outside 1..{limit} (0 means {default})")
            return default
        return value or default

    def index(self, path: str, value: int, limit: int) -> int:
        """An integer in 0..limit; an invalid value is replaced by 0."""
        if not 0 <= value <= limit:
            self.report(path, f"{value} is outside 0..{limit}")
            return 0
        return value

    def text(self, path: str, value: str, limit: int, *, required: bool = False) -> str:
        """A text of at most ``limit`` characters; if ``required``, not only white space."""
        if len(value) > limit:
            self.report(path, f"has {len(value)} characters, more than the limit of {limit}")
        if required and not value.strip():
            self.report(path, "must not be empty")
        return value

    def known(self, path: str, value: int, enum: EnumDescriptor) -> int:
        """A value that the enum defines."""
        if value not in enum.values_by_number:
            self.report(path, f"{value} is not a value of the enum {enum.full_name}")
        return value


def page_size(requested: int) -> int:
    """The number of entries of a page, 1..1000; 0 means 50. Raises FieldInvalid."""
    fields = Fields()
    size = fields.count("page_size", requested, DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    fields.check()
    return size


def float32(value: float) -> float:
    """The value rounded to 7 digits, as a caller wrote it before it became a 32-bit float: 0.7, not 0.699999988.

    NaN and infinities are returned unchanged.
    """
    return float(f"{value:.7g}") if math.isfinite(value) else value


def nearest_float32(value: float) -> float:
    """The nearest 32-bit float."""
    nearest: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return nearest


@contextmanager
def at(prefix: str) -> Iterator[None]:
    """Prefix the paths of violations raised inside with the path of the nested message in the request."""
    try:
        yield
    except FieldInvalid as error:
        raise FieldInvalid(*_within(prefix, error.violations)) from error
    except NonFiniteLatents as error:
        raise NonFiniteLatents(error.summary, violations=_within(prefix, error.violations)) from error


def _within(prefix: str, violations: tuple[FieldViolation, ...]) -> tuple[FieldViolation, ...]:
    return tuple(FieldViolation(f"{prefix}.{v.path}", v.description) for v in violations)
